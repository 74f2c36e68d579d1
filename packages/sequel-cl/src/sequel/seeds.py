"""Several seeds of one run in one JAX program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sequel.algorithms import Algorithm, Joint
from sequel.learner import Learner
from sequel.result import Result
from sequel.rng import stream
from sequel.scenarios import Scenario

__all__ = ["fit_seeds"]


def fit_seeds(
    make_model: Callable[[int], Any],
    optimizer: Any,
    algorithm: Algorithm,
    scenario: Scenario,
    epochs: int = 1,
    *,
    seeds: Sequence[int],
    **options: Any,
) -> list[Result]:
    """Run S seeds at once: the steps are vmapped over the seeds; returns one result per seed.

    ``make_model(seed)`` gives the JAX model of a seed, ``options`` go to :class:`sequel.Learner`. Each
    result is that of the seed's own run, up to the rounding of batched products.
    """
    import jax
    import jax.numpy as jnp

    from sequel.backends.jax import pad_plans, padded_data

    learners = [
        Learner(make_model(seed), optimizer, algorithm, backend="jax", seed=seed, **options)
        for seed in seeds
    ]
    for learner in learners:
        learner.setup(scenario)
        learner.initial = learner.evaluate()
    lead = learners[0].backend
    common = type(algorithm).training_data in (Algorithm.training_data, Joint.training_data)
    data_axis = None if common else 0
    stack = jax.tree_util.tree_map

    def chunk(carry: Any, data: Any, plan: Any, active: Any, constants: Any) -> Any:
        def one(c: Any, d: Any, p: Any) -> Any:
            return lead.chunk(c, d, {**p, "active": active}, constants)

        return jax.vmap(one, in_axes=(0, data_axis, 0))(carry, data, plan)

    compiled = jax.jit(chunk, donate_argnums=0)
    for task in range(len(scenario)):
        datas = []
        for learner in learners:
            learner.tools.task = task
            learner.position = {"task": task, "epoch": 0, "step": 0}
            back = learner.backend
            back.start_task(learner._scale(task), learner.reset_optimizer and task > 0)
            back.hook("on_task_start", task, learner.tools)
            datas.append(algorithm.training_data(scenario, task, learner.tools, back.state))
        if len({len(d) for d in datas}) > 1:
            raise ValueError("the seeds train on different numbers of samples; run them one by one")
        parts = [padded_data(d, learner.pad) for d in (datas[:1] if common else datas)]
        data = parts[0] if common else stack(lambda *a: jnp.stack(a), *parts)
        carry = stack(
            lambda *leaves: jnp.stack(leaves),
            *[
                (le.backend.params, le.backend.opt_state, le.backend.state, le.backend.collections)
                for le in learners
            ],
        )
        n, size = len(datas[0]), learners[0].batch_size
        steps = -(-n // size)
        for epoch in range(epochs):
            orders = [stream(le.seed, "order", task, epoch).permutation(n) for le in learners]
            keys = [
                stream(le.seed, "noise", task, epoch).integers(2**32, size=(steps, 2), dtype="u4")
                for le in learners
            ]
            for at in range(0, steps, lead.scan_steps):
                stop = min(at + lead.scan_steps, steps)
                tables = []
                for le, order, key, d in zip(learners, orders, keys, datas, strict=False):
                    plans = [
                        le._plan(d, order[s * size : (s + 1) * size], (task, epoch, s), key[s])
                        for s in range(at, stop)
                    ]
                    tables.append(
                        pad_plans(plans, le.info, le.spec, lead.scan_steps, lead.model.dtype)
                    )
                active = jnp.asarray(tables[0].pop("active"))
                for table in tables[1:]:
                    table.pop("active")
                plan = {k: jnp.asarray(np.stack([t[k] for t in tables])) for k in tables[0]}
                carry, losses = compiled(carry, data, plan, active, lead.constants(task))
                if not np.isfinite(np.asarray(losses)).all():
                    raise FloatingPointError(f"a loss is not finite in task {task}, epoch {epoch}")
                for le, row in zip(learners, np.asarray(losses, dtype=np.float64), strict=True):
                    le.losses += row[: stop - at].tolist()
        for i, learner in enumerate(learners):
            back = learner.backend
            back.params, back.opt_state, back.state, back.collections = stack(
                lambda leaf, i=i: leaf[i], carry
            )
            back.hook("on_task_end", task, learner.tools)
            learner.matrix[task] = learner.evaluate()
        scenario[task].forget()
    return [learner.result() for learner in learners]
