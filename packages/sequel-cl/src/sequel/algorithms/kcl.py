"""Kernel continual learning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sequel import _check
from sequel.algorithms.base import Algorithm, Context, Info, State
from sequel.ops.base import Array, Ops, Tree
from sequel.rng import stream

if TYPE_CHECKING:
    from sequel.engine import Tools
    from sequel.scenarios import Data, Scenario

__all__ = ["KCL"]

KERNELS = ("rff", "rbf", "linear", "poly")


@dataclass(frozen=True)
class KCL(Algorithm):
    """Kernel continual learning (Derakhshani et al. 2021): a kernel classifier per task on a coreset.

    C_t: ``coreset`` samples held out of task t. h = encoder(x), φ = (h - min)/(max - min) with the
    coreset's range. With K, k the kernel matrices among C_t and between C_t and x,
    A = (K + (abs(l_t) + 0.01) I)⁻¹ Y_C, logits = g_t k' A + b_t, loss = CE + tau KL(posterior || prior).
    ``"rff"``: ψ(φ) = sqrt(2/D) cos(ω φ' + b), ω ~ N(mu, exp(logvar)) from an ELU network of the mean
    feature of C (posterior); the prior's network sees the mean of x. Needs an encoder, and task ids.

    Args:
        coreset: samples per task, >= 1.
        features: D, number of random features.
        tau: weight of the KL term, >= 0.
        kernel: ``"rff"``, ``"rbf"`` (exp(-‖x - y‖₁ / 4)), ``"linear"``, ``"poly"`` ((x·y + 1)³).

    >>> KCL(kernel="poly").coreset
    20
    """

    coreset: int = 20
    features: int = 2048
    tau: float = 0.01
    kernel: str = "rff"
    needs = frozenset({"features", "task_wise"})

    def check(self) -> None:
        _check.count("coreset", self.coreset)
        _check.count("features", self.features)
        _check.at_least("tau", self.tau, 0.0)
        _check.one_of("kernel", self.kernel, KERNELS)

    def extra_params(self, info: Info) -> dict[str, np.ndarray[Any, Any]]:
        n, d, out = info.n_tasks, info.feature_dim, {}
        for key, value in (("l", 0.1), ("g", 1.0), ("b", 0.0)):
            out[f"algo/{key}"] = np.full(n, value)
        if self.kernel == "rff":
            rng = stream(info.seed, "kcl-init")
            for net in ("posterior", "prior"):
                for i, width in enumerate((d, d, 2 * d)):
                    bound = 1 / math.sqrt(d)
                    out[f"algo/{net}/{i}/w"] = rng.uniform(-bound, bound, (width, d))
                    out[f"algo/{net}/{i}/b"] = rng.uniform(-bound, bound, width)
        return out

    def init(self, ops: Ops, params: Tree, info: Info) -> State:
        leaf = next(iter(params.values()))
        shape = (info.n_tasks, self.coreset, *info.x_shape)
        draw = self.host_plan(stream(info.seed, "kcl-eval"), 0, info)
        return {
            "x": ops.asarray(np.zeros(shape, dtype=info.x_dtype), leaf),
            "y": ops.asarray(np.zeros(shape[:2], dtype=np.int64)),
            **{key: ops.asarray(value, leaf) for key, value in draw.items()},
        }

    def host_plan(
        self, rng: np.random.Generator, n: int, info: Info
    ) -> dict[str, np.ndarray[Any, Any]]:
        if self.kernel != "rff":
            return {}
        return {
            "eps": rng.standard_normal((self.features, info.feature_dim)),
            "phase": rng.uniform(0, 2 * math.pi, self.features),
        }

    def on_task_start(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        data = tools.scenario[task].train
        chosen = self._chosen(len(data.y), task, tools.info.seed)
        leaf = next(iter(params.values()))
        x, y = ops.numpy(state["x"]).copy(), ops.numpy(state["y"]).copy()
        x[task], y[task] = data.x[chosen], data.y[chosen]
        return params, {**state, "x": ops.asarray(x, leaf), "y": ops.asarray(y)}

    def _chosen(self, n: int, task: int, seed: int) -> np.ndarray[Any, Any]:
        if n <= self.coreset:
            raise ValueError(f"coreset={self.coreset} leaves nothing of a task of {n} samples")
        return np.sort(stream(seed, "coreset", task).choice(n, size=self.coreset, replace=False))

    def training_data(self, scenario: Scenario, task: int, tools: Tools, state: State) -> Data:
        data = scenario[task].train
        keep = np.ones(len(data.y), dtype=bool)
        keep[self._chosen(len(data.y), task, tools.info.seed)] = False
        kept: Data = data[np.flatnonzero(keep)]
        return kept

    def loss(
        self, ops: Ops, params: Tree, ctx: Context, state: State
    ) -> tuple[Array, dict[str, Any]]:
        cx, cy = ops.take(state["x"], ctx.task), ops.take(state["y"], ctx.task)
        inner, h = ctx.features(params, cx), ctx.features(params, ctx.batch.x)
        draw = ctx.extra if self.kernel == "rff" else {}
        scores = self._scores(ops, params, inner, cy, h, ctx.task, ctx.info.n_classes, draw)
        value = ctx.mean_loss(scores, ctx.batch)
        if self.kernel == "rff" and self.tau > 0:
            w = ctx.batch.w
            mean = h.mean(0) if w is None else (h * w[:, None]).sum(0) / ops.clip(w.sum(), 1, None)
            m, log_v = self._network(ops, params, "posterior", inner.mean(0))
            m0, log_v0 = self._network(ops, params, "prior", mean)
            ratio = (ops.exp(log_v) + (m0 - m) ** 2) / ops.exp(log_v0)
            value = value + self.tau * 0.5 * (log_v0 - log_v + ratio - 1).sum()
        return value, {"logits": scores}

    def predict(
        self, ops: Ops, params: Tree, model: Any, x: Array, t: Array, state: State
    ) -> Array:
        task = t[0]
        cx, cy = ops.take(state["x"], task), ops.take(state["y"], task)
        inner, h = model.features(params, cx, False), model.features(params, x, False)
        n_classes = model.n_classes
        return self._scores(ops, params, inner, cy, h, task, n_classes, state)

    def _network(self, ops: Ops, params: Tree, net: str, h: Array) -> tuple[Array, Array]:
        for i in range(3):
            h = params[f"algo/{net}/{i}/w"] @ h + params[f"algo/{net}/{i}/b"]
            if i < 2:
                h = ops.elu(h)
        d = len(h) // 2
        return h[:d], h[d:]

    def _scores(
        self,
        ops: Ops,
        params: Tree,
        inner: Array,
        cy: Array,
        h: Array,
        task: Any,
        n_classes: int,
        draw: dict[str, Array],
    ) -> Array:
        low, high = inner.min(), inner.max()
        span = ops.clip(high - low, 1e-12, None)
        a, b = (inner - low) / span, (h - low) / span
        if self.kernel == "rff":
            mean, log_v = self._network(ops, params, "posterior", inner.mean(0))
            omega = mean + ops.exp(0.5 * log_v) * draw["eps"]
            scale = math.sqrt(2 / self.features)
            psi = [scale * ops.cos(z @ omega.T + draw["phase"]) for z in (a, b)]
            K, k = psi[0] @ psi[0].T, psi[0] @ psi[1].T
        elif self.kernel == "rbf":
            K, k = (ops.exp(-ops.abs(a[:, None] - z[None]).sum(-1) / 4) for z in (a, b))
        else:
            K, k = a @ a.T, a @ b.T
            if self.kernel == "poly":
                K, k = (K + 1) ** 3, (k + 1) ** 3
        ridge = ops.abs(ops.take(params["algo/l"], task)) + 0.01
        eye = ops.asarray(np.eye(self.coreset), inner)
        weights = ops.cho_solve(K + ridge * eye, ops.one_hot(cy, n_classes, inner))
        return ops.take(params["algo/g"], task) * (k.T @ weights) + ops.take(params["algo/b"], task)
