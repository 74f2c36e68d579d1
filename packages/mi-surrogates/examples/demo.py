"""Design of a sampling calorimeter by information, by reconstruction, by CMA-ES and at random.

`python examples/demo.py [--out DIR] [--json] [--seed 10]` takes about one and a half minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mi_surrogates import DesignSpace, MIObjective, Parameter, RecoObjective, optimize
from mi_surrogates.information import ksg, mutual_information
from mi_surrogates.loop.execute import seed_of
from mi_surrogates.problems import DigitSensors
from mi_surrogates.simulators import SamplingCalorimeter

DESIGNS, EVENTS, ITERATIONS, SEEDS = 20, 400, 30, 2
BUDGET = DESIGNS * EVENTS * ITERATIONS
SHORT = 30  # critic steps in the comparison of warm and cold


def make_space(calo: SamplingCalorimeter) -> DesignSpace:
    space = DesignSpace(
        {n: Parameter(20 if n[0] == "a" else 5, 0.05, 100, sigma=3) for n in calo.names}
    )
    space.add_linear([1.0] * 6, upper=200.0)
    return space


def ours(objective: Any, **options: Any) -> Callable[[SamplingCalorimeter, int], np.ndarray]:
    def run(calo: SamplingCalorimeter, seed: int) -> np.ndarray:
        result = optimize(
            calo,
            make_space(calo),
            objective(),
            surrogate="quadratic",
            designs=DESIGNS,
            events=EVENTS,
            iterations=ITERATIONS,
            seed=seed,
            progress=False,
            **options,
        )
        assert result.events <= BUDGET
        assert result.constraint_violation <= 1e-3
        return result.theta

    return run


def ksg_value(calo: SamplingCalorimeter, theta: np.ndarray, seed: int) -> float:
    x, y = calo(theta, EVENTS, seed)
    return ksg(torch.from_numpy(x), torch.from_numpy(y), 5).item()


def cma_ksg(calo: SamplingCalorimeter, seed: int) -> np.ndarray:
    """pycma on the KSG estimate, same events, same start and spread, infeasible designs projected."""
    import cma

    space = make_space(calo)
    strategy = cma.CMAEvolutionStrategy(
        space.initial, 3.0, {"seed": seed + 1, "verbose": -9, "bounds": [0.05, 100.0]}
    )
    used, generation = 0, 0
    while used + strategy.popsize * EVENTS <= BUDGET:
        asked = strategy.ask()
        common = seed_of(seed, generation)
        strategy.tell(asked, [-ksg_value(calo, space.project(t), common) for t in asked])
        used, generation = used + len(asked) * EVENTS, generation + 1
    return space.project(strategy.mean)


def random_ksg(calo: SamplingCalorimeter, seed: int) -> np.ndarray:
    """The best KSG estimate among random feasible designs, same events."""
    designs = make_space(calo).sample(BUDGET // EVENTS, seed)
    values = [ksg_value(calo, theta, seed_of(seed, 0)) for theta in designs]
    return designs[int(np.argmax(values))]


METHODS: dict[str, Callable[[SamplingCalorimeter, int], np.ndarray]] = {
    "start": lambda calo, seed: make_space(calo).initial,
    "RECO-OPT": ours(RecoObjective),
    "MI-OPT": ours(MIObjective),
    "MI-OPT short, warm": ours(lambda: MIObjective(steps=SHORT, check_every=SHORT)),
    "MI-OPT short, cold": ours(
        lambda: MIObjective(steps=SHORT, check_every=SHORT), warm_start=False
    ),
    "CMA-ES on KSG": cma_ksg,
    "random on KSG": random_ksg,
}
PLASTIC = ("start", "RECO-OPT", "MI-OPT", "CMA-ES on KSG", "random on KSG")


def nats(calo: SamplingCalorimeter, theta: np.ndarray) -> float:
    """The information by an independent decoder on 8,000 new events, a lower bound."""
    x, y = calo(theta, 8000, 99)
    est = mutual_information(x, y, "ba", x_entropy=calo.x_entropy, components=3, max_steps=500)
    return est.value


def study(
    calo: SamplingCalorimeter, names: Any, seeds: range, label: str, quiet: bool
) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for name in names:
        for seed in seeds:
            if name == "start" and seed != seeds[0]:
                continue
            begin = time.perf_counter()
            theta = METHODS[name](calo, seed)
            spent = time.perf_counter() - begin
            loss, resolution = calo.judge(theta)
            row = {"theta": theta, "loss": loss, "resolution": resolution, "seconds": spent}
            row["nats"] = nats(calo, theta)
            found.setdefault(name, []).append(row)
            if quiet:
                continue
            print(
                f"{label} {name:20} seed {seed}: loss {loss:.4f}, resolution {resolution:.2%}, "
                f"{row['nats']:.2f} nats, {np.round(theta, 1)}, {spent:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return found


def digits(seed: int) -> dict[str, float]:
    """Place six photodiodes on real digits by information; a k-NN on other images judges."""
    sensors = DigitSensors(6)
    objective = MIObjective("ba", classes=10, x_entropy=float(np.log(10)), hidden=(48,))
    result = optimize(
        sensors,
        sensors.space(seed),
        objective,
        surrogate="quadratic",
        designs=24,
        events=600,
        iterations=15,
        seed=seed,
        progress=False,
    )
    rng = np.random.default_rng(seed)
    others = [sensors.accuracy(rng.uniform(0, 7, 12)) for _ in range(20)]
    grids = [
        np.array([[r, c] for r in rows for c in columns], dtype=float).ravel()
        for rows, columns in (
            ((2.0, 5.0), (1.5, 3.5, 5.5)),
            ((1.5, 3.5, 5.5), (2.5, 4.5)),
            ((2.5, 4.5), (2.0, 3.5, 5.0)),
            ((1.0, 3.5, 6.0), (2.0, 5.0)),
        )
    ]
    return {
        "start": sensors.accuracy(sensors.space(seed).initial),
        "ours": sensors.accuracy(result.theta),
        "random": float(np.mean(others)),
        "grid": max(sensors.accuracy(grid) for grid in grids),
    }


def plot(studies: dict[str, dict[str, list[dict]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for ax, (title, found) in zip(axes, studies.items(), strict=True):
        for i, rows in enumerate(found.values()):
            for j, row in enumerate(rows):
                left, y = 0.0, i + 0.36 * j
                for k, width in enumerate(row["theta"]):
                    colour = ("0.35", "tab:cyan")[k % 2]
                    ax.barh(y, width, 0.3, left=left, color=colour, edgecolor="white", lw=0.4)
                    left += width
                ax.text(left + 2, y, f"{row['resolution']:.1%}", va="center", fontsize=7)
        ax.set_yticks(np.arange(len(found)) + 0.18, list(found), fontsize=8)
        ax.invert_yaxis()
        ax.set(
            title=title, xlabel="depth in mm (grey absorber, blue scintillator); σ/E", xlim=(0, 225)
        )
    figure.savefig(path, dpi=130)


def table(title: str, found: dict[str, list[dict]]) -> dict[str, Any]:
    rows = [
        [
            name,
            " ".join(f"{v:.1f}" for v in row["theta"]),
            f"{row['theta'][::2].sum():.1f}",
            f"{row['loss']:.4f}",
            f"{row['resolution']:.2%}",
            f"{row['nats']:.2f}",
            f"{row['seconds']:.1f}",
        ]
        for name, rows in found.items()
        for row in rows
    ]
    columns = ["method", "a1 s1 a2 s2 a3 s3 / mm", "absorber / mm", "loss", "σ/E", "nats", "s"]
    return {"title": title, "columns": columns, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo/mi-surrogates"))
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--json", action="store_true", help="print demo.json")
    parser.add_argument("--seed", type=int, default=10, help="the first of two seeds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="cma")
    begin = time.perf_counter()
    seeds = range(arguments.seed, arguments.seed + SEEDS)
    crystal = SamplingCalorimeter(["Pb", "PbWO4"] * 3)
    plastic = SamplingCalorimeter(["Pb", "polystyrene"] * 3)
    a = study(crystal, METHODS, seeds, "Pb/PbWO4", arguments.quiet)
    b = study(plastic, PLASTIC, seeds, "Pb/polystyrene", arguments.quiet)
    sensor_rows = [digits(seed) for seed in seeds]

    def losses(found: dict[str, list[dict]], name: str) -> list[float]:
        return [row["loss"] for row in found[name]]

    def absorber(found: dict[str, list[dict]], name: str) -> list[float]:
        return [float(row["theta"][::2].sum()) for row in found[name]]

    start = a["start"][0]
    mi, reco = a["MI-OPT"], a["RECO-OPT"]
    gap = max(
        abs(x - y) for x, y in zip(absorber(a, "MI-OPT"), absorber(a, "RECO-OPT"), strict=True)
    )
    ratio = max(
        max(m["resolution"], r["resolution"]) / min(m["resolution"], r["resolution"])
        for m, r in zip(mi, reco, strict=True)
    )
    warm, cold = losses(a, "MI-OPT short, warm"), losses(a, "MI-OPT short, cold")
    ours_digits, random_digits, grid_digits = (
        float(np.mean([row[key] for row in sensor_rows])) for key in ("ours", "random", "grid")
    )

    def some(values: list[float], form: str = ".4f") -> str:
        return ", ".join(format(v, form) for v in values)

    claims = [
        {
            "claim": "Pb/PbWO4: information and reconstruction both trade absorber for scintillator",
            "baseline": f"start: absorber 60 mm, σ/E {start['resolution']:.1%}",
            "ours": f"absorber MI {some(absorber(a, 'MI-OPT'), '.1f')}, "
            f"RECO {some(absorber(a, 'RECO-OPT'), '.1f')} mm, "
            f"σ/E {some([r['resolution'] for r in [*mi, *reco]], '.2%')}",
            "holds": max(absorber(a, "MI-OPT") + absorber(a, "RECO-OPT")) < 15
            and max(r["resolution"] for r in [*mi, *reco]) < 0.02,
        },
        {
            "claim": "MI-OPT, which sees no task, agrees with RECO-OPT: absorber to 10 mm, σ/E to 20 %",
            "baseline": "RECO-OPT",
            "ours": f"largest gap {gap:.1f} mm, σ/E ratio {ratio:.2f}",
            "holds": gap <= 10 and ratio <= 1.2,
        },
        {
            "claim": f"carrying the networks over saves data: {SHORT} critic steps an iteration",
            "baseline": f"from scratch: loss {some(cold)}",
            "ours": some(warm),
            "holds": max(warm) < min(cold),
        },
        {
            "claim": "Pb/polystyrene: the optimum is inside; the absorber stays",
            "baseline": f"start: loss {b['start'][0]['loss']:.3f}",
            "ours": f"absorber MI {some(absorber(b, 'MI-OPT'), '.0f')}, "
            f"RECO {some(absorber(b, 'RECO-OPT'), '.0f')} mm, "
            f"loss {some(losses(b, 'MI-OPT') + losses(b, 'RECO-OPT'), '.3f')}",
            "holds": min(absorber(b, "MI-OPT") + absorber(b, "RECO-OPT")) > 30
            and max(losses(b, "MI-OPT") + losses(b, "RECO-OPT")) < b["start"][0]["loss"],
        },
        {
            "claim": "six photodiodes on real digits: information beats random placement by 10 points (k-NN)",
            "baseline": f"random {random_digits:.1%}, best regular grid {grid_digits:.1%}",
            "ours": f"{ours_digits:.1%}",
            "holds": ours_digits > random_digits + 0.10,
        },
    ]
    cma_loss = losses(a, "CMA-ES on KSG")
    findings = [
        (
            f"CMA-ES on KSG with the same events reaches losses of {some(cma_loss)} on Pb/PbWO4 in "
            f"{a['CMA-ES on KSG'][0]['seconds']:.1f} s; MI-OPT {some(losses(a, 'MI-OPT'))} in "
            f"{mi[0]['seconds']:.1f} s, RECO-OPT {some(losses(a, 'RECO-OPT'))} in "
            f"{reco[0]['seconds']:.1f} s."
        ),
        (
            f"On Pb/polystyrene CMA-ES on KSG is at {some(losses(b, 'CMA-ES on KSG'), '.3f')}, MI-OPT at "
            f"{some(losses(b, 'MI-OPT'), '.3f')}, RECO-OPT at {some(losses(b, 'RECO-OPT'), '.3f')}, "
            f"random at {some(losses(b, 'random on KSG'), '.3f')}."
        ),
        (
            f"Random search over {BUDGET // EVENTS} designs reaches {some(losses(a, 'random on KSG'))} "
            "on Pb/PbWO4."
        ),
        (
            f"On the digits the best of four regular grids has {grid_digits:.1%}, the optimised sensors "
            f"{ours_digits:.1%}."
        ),
    ]
    result = {
        "package": "mi-surrogates",
        "title": "Climbing a local surrogate of the information between truth and measurement designs a "
        "detector without choosing a task.",
        "data": "a shower simulation of a sampling calorimeter (Longo-Sestili profiles, Grindhammer-Peters "
        "fluctuations); scikit-learn's load_digits, 1,797 real 8x8 digits",
        "claims": claims,
        "tables": [
            table(f"Pb/PbWO4, {BUDGET:,} events each", a),
            table(f"Pb/polystyrene, {BUDGET:,} events each", b),
            {
                "title": "Six photodiodes on digits, accuracy of 9 nearest neighbours on unseen images",
                "columns": ["seed", "start", "random (mean of 20)", "best grid", "optimised"],
                "rows": [
                    [str(seed), *(f"{row[k]:.1%}" for k in ("start", "random", "grid", "ours"))]
                    for seed, row in zip(seeds, sensor_rows, strict=True)
                ],
            },
        ],
        "figures": [{"file": "demo.png", "caption": "Designs and their energy resolution."}],
        "findings": findings,
        "seconds": time.perf_counter() - begin,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "command": " ".join(["python", "examples/demo.py", *sys.argv[1:]]),
        },
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot({"Pb/PbWO4": a, "Pb/polystyrene": b}, arguments.out / "demo.png")
    (arguments.out / "demo.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for each in claims:
            verdict = "holds" if each["holds"] else "FAILED"
            print(f"{verdict:7} {each['claim']}\n        {each['baseline']}  ->  {each['ours']}")
        for finding in findings:
            print("-", finding)
    return int(not all(each["holds"] for each in claims))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
