"""Steps per second: ours against a bare loop, avalanche-lib (if installed) and JAX per step; Fisher; buffers.

All in one process, the same model, batch and threads, repeats interleaved, medians. Avalanche:
``pip install avalanche-lib`` beside the pinned torch.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import sequel
from sequel.fisher import fisher_diagonal

BATCH, N, STEPS = 32, 3200, 100


def median_of(cases: dict[str, Any], repeats: int) -> dict[str, float]:
    """Median seconds of each case over interleaved repeats, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(repeats):
        for name, case in cases.items():
            start = time.process_time()
            case()
            times[name].append(time.process_time() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def data() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((N, 784), dtype=np.float32), rng.integers(0, 10, N)
    return x, y, x[:500], y[:500]


def model() -> Any:
    torch.manual_seed(0)
    return sequel.nn.MLP(784, (256, 256), 10)


def bare() -> Any:
    x, y, *_ = (torch.tensor(a) for a in data())
    net = model()
    opt = torch.optim.SGD(net.parameters(), 0.01)

    def run() -> None:
        order = torch.randperm(N)
        for at in range(0, N, BATCH):
            index = order[at : at + BATCH]
            opt.zero_grad()
            nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            opt.step()

    return run


def ours(algorithm: Any, tasks: int = 1) -> Any:
    """One epoch of the task behind ``tasks`` consolidated ones, without evaluation."""
    scenario = sequel.scenarios.permuted(data(), 2)
    net = model()
    learner = sequel.Learner(
        net, torch.optim.SGD(net.parameters(), 0.01), algorithm, batch_size=BATCH
    )
    learner.setup(scenario)
    back = learner.backend
    for _ in range(tasks):
        back.hook("on_task_end", 0, learner.tools)
    if learner.spec is not None and learner.spec.policy != "manual":
        learner.fit_task(0, 1)
    learner.start_task(1)
    part = scenario[1].train
    back.load(part, N)
    count = [0]

    def run() -> None:
        count[0] += 1
        learner.position = {"task": 1, "epoch": 0, "step": 0}
        learner._epoch(part, 1, count[0], 10**6)

    return run


def jax_cases() -> dict[str, Any]:
    import optax

    def epoch(steps: int) -> Any:
        scenario = sequel.scenarios.permuted(data(), 1)
        learner = sequel.Learner(
            sequel.nn.to_jax(model()), optax.sgd(0.01), sequel.Naive(), batch_size=BATCH,
            scan_steps=steps,
        )  # fmt: skip
        learner.setup(scenario)
        part = scenario[0].train
        learner.backend.load(part, N)

        def run() -> None:
            learner.position = {"task": 0, "epoch": 0, "step": 0}
            learner._epoch(part, 0, 0, 10**6)

        return run

    import jax
    import jax.numpy as jnp

    zoo = sequel.nn.to_jax(model())
    tx = optax.sgd(0.01)
    x, y, *_ = (jnp.asarray(a) for a in data())

    @jax.jit
    def step(params: Any, opt: Any, xb: Any, yb: Any) -> Any:
        def loss(p: Any) -> Any:
            logits = jax.nn.log_softmax(zoo.apply(p, xb))
            return -jnp.take_along_axis(logits, yb[:, None], 1).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt, value

    state = [zoo.params, tx.init(zoo.params)]

    def per_step() -> None:
        order = np.random.permutation(N)  # noqa: NPY002
        for at in range(0, N, BATCH):
            index = order[at : at + BATCH]
            state[0], state[1], value = step(state[0], state[1], x[index], y[index])
        value.block_until_ready()

    return {"bare jit, per step": per_step, "ours, epoch in one scan": epoch(STEPS)}


def mend_torchvision() -> Any:
    """The registry's torchvision, which avalanche imports, wants two operators that a CPU torch lacks."""
    lib = torch.library.Library("torchvision", "DEF")
    try:
        lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        lib.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        return None
    return lib


_LIB = mend_torchvision()


def avalanche_cases() -> dict[str, Any]:
    try:
        from avalanche.benchmarks import tensors_benchmark
        from avalanche.training import supervised as S
        from avalanche.training.plugins import EvaluationPlugin
    except (ImportError, RuntimeError, AttributeError) as error:
        print(f"avalanche-lib is not usable here: {type(error).__name__}: {error}", file=sys.stderr)
        return {}
    x, y, xt, yt = (torch.tensor(a) for a in data())
    made = tensors_benchmark(
        train_tensors=[(x, y), (x, y)], test_tensors=[(xt, yt), (xt, yt)], task_labels=[0, 0],
        complete_test_set_only=False,
    )  # fmt: skip
    first, second = made.train_stream

    def case(make: Any) -> Any:
        net = model()
        strategy = make(
            net, torch.optim.SGD(net.parameters(), 0.01), nn.CrossEntropyLoss(),
            train_mb_size=BATCH, train_epochs=1, evaluator=EvaluationPlugin(),
        )  # fmt: skip
        strategy.train(first)
        return lambda: strategy.train(second)

    def plus(kind: Any, **kw: Any) -> Any:
        return lambda *a, **k: kind(*a, **k, **kw)

    return {
        "avalanche naive": case(S.Naive),
        "avalanche SI": case(plus(S.SynapticIntelligence, si_lambda=0.1)),
        "avalanche replay": case(plus(S.Replay, mem_size=500)),
        "avalanche A-GEM": case(plus(S.AGEM, patterns_per_exp=100, sample_size=BATCH)),
        "avalanche EWC": case(plus(S.EWC, ewc_lambda=1.0, mode="online", decay_factor=1.0)),
    }


def fisher_cases(network: str) -> dict[str, Any]:
    torch.manual_seed(0)
    if network == "mlp":
        net: Any = model()
        x = torch.randn(512, 784)
    else:
        net, x = sequel.nn.CNN((1, 28, 28)), torch.randn(512, 1, 28, 28)
    y = torch.arange(512) % 10

    def loop() -> None:
        total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
        for i in range(128):  # a quarter; scaled below
            net.zero_grad()
            nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
            for n, p in net.named_parameters():
                total[n] += p.grad**2

    return {
        "loop": loop,
        "vmap": lambda: fisher_diagonal(net, [(x, y)], closed_form=False),
        "ours": lambda: fisher_diagonal(net, [(x, y)]),
    }


def buffer_rates() -> dict[str, float]:
    out = {}
    for batch in (100, 10_000):
        from sequel.buffer import Slots

        slots, y = Slots(1000), np.zeros(batch, dtype=np.int64)
        start = time.process_time()
        for _ in range(10**6 // batch):
            slots.add(y)
        out[f"items/s, batches of {batch}"] = 10**6 / (time.process_time() - start)
    buffer = sequel.ReplayBuffer(1000)
    x, y2 = torch.zeros(100, 784), torch.zeros(100, dtype=torch.int64)
    for label, before in (("start", 0), ("after 10^6 items", 10**6)):
        buffer.slots.seen = max(buffer.slots.seen, before)
        times = []
        for _ in range(200):
            start = time.process_time()
            buffer.add(x=x, y=y2)
            times.append(time.process_time() - start)
        out[f"add of 100, {label}, us"] = 1e6 * float(np.median(times))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    cases = {
        "bare loop": bare(),
        "naive": ours(sequel.Naive()),
        "EWC": ours(sequel.EWC(lam=1.0)),
        "EWC, 50 tasks": ours(sequel.EWC(lam=1.0), 50),
        "SI": ours(sequel.SI(lam=0.1)),
        "MAS": ours(sequel.MAS(lam=0.01)),
        "ER": ours(sequel.ER(memory=500)),
        "A-GEM": ours(sequel.AGEM(per_task=100, replay_batch=BATCH)),
        "DER++": ours(sequel.DERpp(memory=500)),
        **avalanche_cases(),
    }
    seconds = median_of(cases, args.repeats)
    rates = {name: STEPS / s for name, s in seconds.items()}
    print(f"{'case':18} {'steps/s':>9} {'x bare':>7}")
    for name, rate in rates.items():
        print(f"{name:18} {rate:9.0f} {rate / rates['bare loop']:7.2f}")
    jax = {name: STEPS / s for name, s in median_of(jax_cases(), args.repeats).items()}
    for name, rate in jax.items():
        print(f"JAX {name:24} {rate:9.0f} steps/s")
    fisher = {}
    for network in ("mlp", "cnn"):
        s = median_of(fisher_cases(network), 3)
        fisher[network] = {
            "loop": 128 / s["loop"],
            "vmap": 512 / s["vmap"],
            "ours": 512 / s["ours"],
        }
        print(
            f"Fisher {network}: " + ", ".join(f"{k} {v:.0f}/s" for k, v in fisher[network].items())
        )
    buffers = buffer_rates()
    for name, value in buffers.items():
        print(f"buffer {name}: {value:,.0f}")
    if args.json:
        cpu = next(
            (li.split(":")[1].strip() for li in Path("/proc/cpuinfo").read_text().splitlines()
             if li.startswith("model name")), platform.processor(),
        )  # fmt: skip
        record = {
            "steps": rates, "jax": jax, "fisher": fisher, "buffer": buffers, "processor": cpu,
            "python": platform.python_version(), "torch": torch.__version__,
            "threads": args.threads, "command": " ".join(["python", *sys.argv]),
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
