"""JAX's side: an epoch (or a part of one) is a single scan, compiled once for the whole stream.

Everything that changes between tasks, the importance, the anchors, the task's number and the learning
rate, is an input of the compiled function. Short batches and short epochs are padded: rows get weight
0, steps are skipped by ``lax.cond``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

try:
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as error:  # pragma: no cover - tested in a process of its own
    raise ImportError(
        "the JAX backend needs jax, optax and flax: pip install sequel-cl[jax]"
    ) from error
import numpy as np

from sequel.algorithms.base import Algorithm, Info, State
from sequel.backends.jax_model import CellOps, JaxModel
from sequel.backends.preload import wanted
from sequel.engine import empty_memory, one_step
from sequel.fisher import chunk_sums
from sequel.nn.jax import as_functional
from sequel.ops.base import Tree

if TYPE_CHECKING:
    from sequel.engine import Tools
    from sequel.scenarios import Data

__all__ = ["JaxBackend"]


class JaxBackend:
    """Parameters, optimizer state and algorithm state of one run under JAX."""

    name = "jax"
    careful = skipped = False  # the compiled step itself leaves no trace of a skipped one

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        lr: float | None = None,
        scan_steps: int = 256,
        preload: bool | str = "auto",
    ) -> None:
        if not isinstance(optimizer, optax.GradientTransformation):
            raise TypeError(
                f"optimizer must be an optax.GradientTransformation with the JAX backend, got "
                f"{type(optimizer).__name__}"
            )
        self.ops = CellOps()
        self.model = JaxModel(as_functional(model), self.ops)
        self.optimizer, self.base_lr, self.lr = optimizer, lr, lr
        self.scan_steps, self.preload = scan_steps, preload
        self.host: Data | None = None
        self.scale = 1.0
        self.params: Tree = dict(self.model.start)
        collections = self.model.model.collections
        self.collections = jax.tree_util.tree_map(jnp.array, collections)
        self.state: State = {}
        self.traces = 0

    def feature_dim(self, x: np.ndarray[Any, Any]) -> int:
        """Return the width of the encoder's output."""
        return int(self.model.features(self.params, jnp.asarray(x), False).shape[1])

    def n_outputs(self, x: np.ndarray[Any, Any]) -> int:
        """Return the width of the model's output."""
        self._evaluation_cell()
        found = jax.eval_shape(lambda p, v: self.model.forward(p, v, False), self.params, x)
        return int(found.shape[-1])

    def bind(self, algorithm: Algorithm, info: Info, **context: Any) -> None:
        """Prepare a run."""
        self.algorithm, self.info = algorithm, info
        like = next(iter(self.params.values()))
        for name, value in algorithm.extra_params(info).items():
            self.params[name] = self.ops.asarray(value, like)
        self.nan, mask = context.pop("nan"), context.pop("mask")
        self.mask = None if mask is None else jnp.asarray(mask)
        self.context = {**context, "info": info}
        self.spec = algorithm.memory_spec(info)
        self.state = algorithm.init(self.ops, self.params, info)
        if self.spec is not None:
            self.state["memory"] = empty_memory(self.ops, self.spec, info, like)
        self.opt_state = self.optimizer.init(self.params)
        self.chunk = self.make_chunk()
        self.compiled = jax.jit(self.chunk, donate_argnums=0)
        self.evaluate = jax.jit(self._evaluate)

    def make_chunk(self) -> Callable[..., Any]:
        """Return the pure function (carry, data, plan, constants) -> (carry, losses)."""

        def chunk(carry: Any, data: Any, plan: Any, constants: Any) -> Any:
            self.traces += 1  # runs while tracing only

            def body(carry: Any, step: Any) -> Any:
                step = dict(step)
                active = step.pop("active")
                return jax.lax.cond(
                    active,
                    lambda c: self._step(c, data, step, constants),
                    lambda c: (c, jnp.zeros((), self.model.dtype)),
                    carry,
                )

            return jax.lax.scan(body, carry, plan)

        return chunk

    def _step(self, carry: Any, data: Any, step: Any, constants: Any) -> Any:
        params, opt_state, state, collections = carry
        after: dict[str, Any] = {"opt": opt_state}

        def apply(p: Tree, grads: Tree) -> Tree:
            updates, after["opt"] = self.optimizer.update(grads, opt_state, p)
            scale = constants["scale"]
            scaled = jax.tree_util.tree_map(lambda u: u * scale.astype(u.dtype), updates)
            out: Tree = optax.apply_updates(p, scaled)
            return out

        plan = {k: v for k, v in step.items() if k != "key"}
        self.ops.cell = {
            "key": jax.random.wrap_key_data(step["key"], impl="threefry2x32"),
            "collections": collections,
        }
        params_, state_, value = one_step(
            self.algorithm,
            self.ops,
            self.model,
            data,
            plan,
            params,
            state,
            self.spec,
            task=constants["task"],
            past=None,
            lr=constants["lr"],
            mask=constants["mask"],
            apply=apply,
            assign=lambda p: p,
            **self.context,
        )
        new = (params_, after["opt"], state_, self.ops.cell["collections"])
        if self.nan == "skip":
            finite = jnp.stack([jnp.isfinite(p).all() for p in params_.values()]).all()
            finite = finite & jnp.isfinite(value)
            new = jax.tree_util.tree_map(lambda a, b: jnp.where(finite, a, b), new, carry)
            value = jnp.where(finite, value, jnp.nan)
        return new, value.astype(self.model.dtype)

    # ------------------------------------------------------------------ tasks
    def start_task(self, scale: float, reset: bool) -> None:
        """Set the learning rate's factor and forget the optimizer's moments."""
        self.scale = scale
        self.lr = None if self.base_lr is None else self.base_lr * scale
        if reset:
            self.opt_state = self.optimizer.init(self.params)

    def hook(self, which: str, task: int, tools: Tools) -> None:
        """Call ``on_task_start`` or ``on_task_end``."""
        self._evaluation_cell()
        fn = getattr(self.algorithm, which)
        self.params, self.state = fn(self.ops, self.params, task, tools, self.state)

    def _evaluation_cell(self) -> None:
        key = jax.random.wrap_key_data(np.zeros(2, dtype=np.uint32), impl="threefry2x32")
        self.ops.cell = {"key": key, "collections": self.collections}

    def make_sums(self, kind: str, temperature: float, masked: Any) -> Any:
        """Return the compiled function that sums squared per-sample gradients over a chunk."""
        sums = chunk_sums(self.ops, self.model, kind, temperature, masked)

        def run(collections: Any, *args: Any) -> Tree:
            self.ops.cell = {**self.ops.cell, "collections": collections}
            return sums(*args)

        compiled = jax.jit(run)

        def call(*args: Any) -> Tree:
            out: Tree = compiled(self.collections, *args)
            self._evaluation_cell()
            return out

        return call

    def load(self, data: Data, pad: int) -> None:
        """Put a task's data on the device, padded so that all tasks have one shape; or keep them here."""
        self.host, self.data = data, {}
        if wanted(self.preload, data, self._free):
            self.host, self.data = None, padded_data(data, pad)

    def _free(self) -> float:
        device = jax.devices()[0]
        stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
        return float(stats.get("bytes_limit", np.inf)) - float(stats.get("bytes_in_use", 0))

    def constants(self, task: int) -> dict[str, Any]:
        """Return the compiled step's task-dependent inputs."""
        dtype = self.model.dtype
        return {
            "task": jnp.asarray(task),
            "scale": jnp.asarray(self.scale, dtype),
            "lr": jnp.asarray(0.0 if self.lr is None else self.lr, dtype),
            "mask": self.mask,
        }

    def run(
        self, plans: list[dict[str, Any]], task: int, emit: Callable[[str], None] | None = None
    ) -> np.ndarray[Any, Any]:
        """Take the planned steps in one compiled scan; returns the losses."""
        stacked = pad_plans(plans, self.info, self.spec, self.scan_steps, self.model.dtype)
        data = self.data
        if self.host is not None:  # the rows of these steps only
            index = stacked["idx"]
            data = padded_data(self.host[index.reshape(-1)], 0)
            stacked["idx"] = np.arange(index.size, dtype=np.int32).reshape(index.shape)
        plan = {k: jnp.asarray(v) for k, v in stacked.items()}
        carry = (self.params, self.opt_state, self.state, self.collections)
        carry = _unaliased(carry)
        carry, values = self.compiled(carry, data, plan, self.constants(task))
        self.params, self.opt_state, self.state, self.collections = carry
        return np.asarray(values, dtype=np.float64)[: len(plans)]

    # ------------------------------------------------------------- evaluation
    def _evaluate(self, params: Tree, state: State, collections: Any, x: Any, t: Any) -> Any:
        self.ops.cell = {
            "key": jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl="threefry2x32"),
            "collections": collections,
        }
        params = self.algorithm.eval_params(self.ops, params, state)
        logits = self.algorithm.predict(self.ops, params, self.model, x, t, state)
        if self.mask is not None:
            logits = jnp.where(self.mask[t], logits, self.ops.neg(logits))
        return logits

    def scores(
        self, x: np.ndarray[Any, Any], t: np.ndarray[Any, Any], batch: int
    ) -> np.ndarray[Any, Any]:
        """Return class scores on the host."""
        out = []
        for at in range(0, len(x), batch):
            part, mine = x[at : at + batch], t[at : at + batch]
            n = len(part)
            if n < batch:
                part = np.concatenate([part, np.repeat(part[:1], batch - n, axis=0)])
                mine = np.concatenate([mine, np.repeat(mine[:1], batch - n)])
            found = self.evaluate(
                self.params, self.state, self.collections, jnp.asarray(part), jnp.asarray(mine)
            )
            out.append(np.asarray(found)[:n])
        return np.concatenate(out)

    # ------------------------------------------------------------- checkpoint
    def arrays(self) -> dict[str, Any]:
        """Return everything that a run has learned, as a tree of host arrays."""
        opt = jax.tree_util.tree_leaves(self.opt_state)
        rest = jax.tree_util.tree_leaves(self.collections)
        return {
            "params": {k: _host(v) for k, v in self.params.items()},
            "opt": {str(i): _host(v) for i, v in enumerate(opt)},
            "buffers": {str(i): _host(v) for i, v in enumerate(rest)},
            "algo": jax.tree_util.tree_map(_host, self.state),
        }

    def load_arrays(self, tree: dict[str, Any]) -> None:
        """Restore what :meth:`arrays` returned."""
        self.params = {k: _device(tree["params"][k], v) for k, v in self.params.items()}
        self.opt_state = _refill(self.opt_state, tree.get("opt", {}))
        self.collections = _refill(self.collections, tree.get("buffers", {}))
        self.state = _restore(self.state, tree.get("algo", {}))


def padded_data(data: Data, pad: int) -> dict[str, Any]:
    """Bring x, y, t to the device with ``pad`` rows."""

    def grown(a: np.ndarray[Any, Any]) -> Any:
        full = np.zeros((max(pad, len(a)), *a.shape[1:]), dtype=a.dtype)
        full[: len(a)] = a
        return jnp.asarray(full)

    return {key: grown(getattr(data, key)) for key in ("x", "y", "t")}


def pad_plans(
    plans: list[dict[str, Any]], info: Info, spec: Any, steps: int, dtype: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """Stack the plans of some steps into arrays of one shape for the whole run."""
    n = len(plans)
    out: dict[str, np.ndarray[Any, Any]] = {}
    widths = {"idx": info.batch_size}
    if spec is not None:
        widths |= {f"replay{i}": spec.draw_size for i in range(spec.draws)}
        if spec.policy != "manual":
            widths["slots"] = info.batch_size
    weights = {"idx": "w", **{f"replay{i}": f"rw{i}" for i in range(spec.draws if spec else 0)}}
    for key, width in widths.items():
        fill = spec.capacity if key == "slots" else 0
        table = np.full((steps, width), fill, dtype=np.int32)
        w = np.zeros((steps, width), dtype=dtype)
        for row, plan in enumerate(plans):
            values = plan.get(key, ())
            table[row, : len(values)] = values
            w[row, : len(values)] = 1
        out[key] = table
        if key in weights:
            out[weights[key]] = w
    for key, first in plans[0].items():
        if key.startswith("extra/") or key == "key":
            kind = dtype if first.dtype.kind == "f" else first.dtype
            if first.dtype == np.int64:
                kind = np.dtype(np.int32)
            whole = np.zeros((steps, *first.shape), dtype=kind)
            whole[:n] = np.stack([plan[key] for plan in plans])
            out[key] = whole
    out["active"] = np.arange(steps) < n
    return out


def _unaliased(tree: Any) -> Any:
    """Copy arrays that occur twice: each is donated once."""
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if id(leaf) in seen:
            return jnp.array(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree_util.tree_map(once, tree)


def _host(x: Any) -> np.ndarray[Any, Any]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    out = np.array(x)
    return out.view(np.int16) if out.dtype == jnp.bfloat16 else out


def _device(value: Any, like: Any) -> Any:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(like))
    value = np.array(value)
    if like.dtype == jnp.bfloat16 and value.dtype == np.int16:
        value = value.view(like.dtype)
    return jnp.asarray(value, like.dtype)


def _refill(like: Any, leaves: dict[str, Any]) -> Any:
    flat, tree = jax.tree_util.tree_flatten(like)
    filled = [_device(leaves[str(i)], v) if str(i) in leaves else v for i, v in enumerate(flat)]
    return jax.tree_util.tree_unflatten(tree, filled)


def _restore(like: Any, tree: Any) -> Any:
    if isinstance(like, dict):
        return {key: _restore(value, tree.get(key, {})) for key, value in like.items()}
    return _device(tree, like)
