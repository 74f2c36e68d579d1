"""A model, an optimizer and an algorithm, bound to a stream of tasks; the same for both backends."""

from __future__ import annotations

import inspect
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from sequel import _check, checkpoint, online, resume
from sequel.algorithms.base import Algorithm, Info, cross_entropy
from sequel.buffer import Slots
from sequel.callbacks import Callback
from sequel.engine import Tools
from sequel.result import Result
from sequel.scenarios import Scenario, Task
from sequel.training import Training

__all__ = ["Learner"]


class Learner(Training):
    """Train a model on a stream of tasks with an algorithm.

    Args:
        model: a ``torch.nn.Module``; or, for JAX, a flax nnx module, a pair (linen module, variables) or a
            :class:`sequel.nn.jax.FunctionalModel`.
        optimizer: a ``torch.optim.Optimizer`` of exactly the model's parameters, or an optax transformation.
        algorithm: e.g. ``sequel.EWC(lam=5.0)``.
        backend: ``"torch"`` or ``"jax"``; None by the model's type.
        loss: ``"cross_entropy"`` or ``fn(ops, logits, y) -> per-sample losses``.
        batch_size, eval_batch_size: samples per step and per evaluation call.
        grad_clip: largest gradient norm, or None.
        lr_decay, min_lr: task t trains with ``max(lr * lr_decay^t, min_lr)``.
        lr: the optimizer's learning rate, where the backend cannot read it (JAX with ``apply="prox"`` or
            ``lr_decay``).
        reset_optimizer: forget the moments at every task.
        device: moves a PyTorch model; JAX uses its default device.
        amp: ``"bf16"`` or ``"fp16"`` runs PyTorch's forward passes under autocast; importances stay in float32.
            Under fp16 the loss is scaled, and steps whose gradients overflow are left out.
        compile: run PyTorch's model through ``torch.compile``.
        preload: a task's data go to the device whole (True), step by step (False), or whole where they take at
            most half of its free memory (``"auto"``).
        features: name of the module that is the encoder (PyTorch; default ``"encoder"``).
        seed: of all counter-based streams.
        deterministic: use CUDA's deterministic kernels; the CPU's are so anyway. (JAX on a GPU:
            ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``.)
        nan: on a loss that is not finite: ``"raise"`` FloatingPointError, ``"skip"`` the step, ``"warn"``.
        eval_every: also evaluate every n steps, for the any-time metrics.
        scan_steps: steps per compiled block (JAX).
        callbacks: see :class:`sequel.callbacks.Callback`.

    >>> import torch, sequel
    >>> x, y = torch.randn(60, 4).numpy(), np.arange(60) % 2
    >>> scenario = sequel.scenarios.permuted((x, y), n_tasks=2)
    >>> model = sequel.nn.MLP(4, (8,), 2)
    >>> learner = Learner(model, torch.optim.SGD(model.parameters(), 0.1), sequel.Naive())
    >>> learner.fit(scenario, epochs=1).matrix.shape
    (2, 2)
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        algorithm: Algorithm,
        *,
        backend: str | None = None,
        loss: str | Callable[..., Any] = "cross_entropy",
        batch_size: int = 32,
        eval_batch_size: int = 1024,
        grad_clip: float | None = None,
        lr_decay: float = 1.0,
        min_lr: float = 5e-5,
        lr: float | None = None,
        reset_optimizer: bool = True,
        device: torch.device | str | None = None,
        amp: str | None = None,
        compile: bool = False,
        preload: bool | str = "auto",
        deterministic: bool = True,
        features: str | None = None,
        seed: int = 0,
        nan: str = "raise",
        eval_every: int | None = None,
        scan_steps: int = 256,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        _check.count("batch_size", batch_size)
        _check.count("eval_batch_size", eval_batch_size)
        _check.count("scan_steps", scan_steps)
        _check.one_of("nan", nan, ("raise", "skip", "warn"))
        _check.one_of("amp", amp, (None, "bf16", "fp16"))
        _check.one_of("preload", preload, (True, False, "auto"))
        _check.one_of("backend", backend, (None, "torch", "jax"))
        _check.above("lr_decay", lr_decay, 0.0)
        _check.at_least("min_lr", min_lr, 0.0)
        if eval_every is not None:
            _check.count("eval_every", eval_every)
        if grad_clip is not None:
            _check.above("grad_clip", grad_clip, 0.0)
        if not isinstance(algorithm, Algorithm):
            raise TypeError(f"algorithm must be a sequel Algorithm, got {type(algorithm).__name__}")
        self._options = {
            name: value
            for name, value in locals().items()
            if name in inspect.signature(Learner).parameters
            and name not in ("model", "optimizer", "algorithm", "device", "callbacks")
            and (name != "loss" or isinstance(value, str))
        }
        self._model = model
        self._check_penalty()
        self.algorithm, self.seed, self.nan = algorithm, seed, nan
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.grad_clip, self.lr_decay, self.min_lr = grad_clip, lr_decay, min_lr
        self.reset_optimizer, self.eval_every = reset_optimizer, eval_every
        self.deterministic = deterministic
        self.pointwise: Any = cross_entropy if loss == "cross_entropy" else loss
        if not callable(self.pointwise):
            raise ValueError(f"loss must be 'cross_entropy' or a function, got {loss!r}")
        self.callbacks = list(callbacks)
        if (backend or ("torch" if isinstance(model, torch.nn.Module) else "jax")) == "torch":
            from sequel.backends.torch import TorchBackend

            self.backend: Any = TorchBackend(
                model,
                optimizer,
                features=features,
                device=device,
                amp=amp,
                compile=compile,
                preload=preload,
            )
        else:
            from sequel.backends.jax import JaxBackend

            if amp is not None:
                raise ValueError(f"amp={amp!r} is PyTorch's; under JAX give the model that dtype")
            needs_lr = lr_decay != 1.0 or getattr(algorithm, "apply", "") == "prox"
            if needs_lr and lr is None:
                raise ValueError("lr must be given with JAX where lr_decay or apply='prox' is used")
            self.backend = JaxBackend(
                model, optimizer, lr=lr, scan_steps=scan_steps, preload=preload
            )
        self.scenario = None
        self._given: Any = None
        self._pending: Any = None
        self.tools: Any = None
        self.position = {"task": 0, "epoch": 0, "step": 0}
        self.global_step = 0

    def _check_penalty(self) -> None:
        if getattr(self._model, "_sequel_penalty", False):
            raise RuntimeError(
                "the model already carries a penalty of sequel.torch: a Learner would apply a second"
            )

    def setup(self, scenario: Scenario | Iterable[Task]) -> None:
        """Bind the learner to a scenario; ``fit`` does it by itself."""
        if self.scenario is not None:
            if scenario is self.scenario or scenario is self._given:
                return
            raise RuntimeError("this learner is bound to another scenario: make a new Learner")
        self._check_penalty()
        self._given, scenario = scenario, Scenario.of(scenario)
        self.emit("on_before_setup")
        first, backend, algorithm = scenario[0].train, self.backend, self.algorithm
        if "features" in algorithm.needs and not backend.model.has_encoder():
            raise TypeError(
                f"{algorithm.name} needs an encoder: give the model an attribute 'encoder', or "
                "features='name' (PyTorch), FunctionalModel(..., features=...) (JAX)"
            )
        self.scenario = scenario
        sizes = tuple(len(task.train_index) for task in scenario)
        source = scenario[0].source
        backend.model.normalize(source.mean, source.std)
        backend.model.n_classes = scenario.n_classes
        width = backend.feature_dim(first.x[:1]) if "features" in algorithm.needs else 0
        self.info = Info(
            n_tasks=len(scenario),
            n_classes=scenario.n_classes,
            batch_size=self.batch_size,
            seed=self.seed,
            x_shape=tuple(first.x.shape[1:]),
            x_dtype=str(first.x.dtype),
            train_sizes=sizes,
            classes=tuple(tuple(task.classes) for task in scenario),
            feature_dim=width,
        )
        self.pad = max(algorithm.training_sizes(sizes))
        if backend.name == "jax":
            backend.scan_steps = min(backend.scan_steps, -(-self.pad // self.batch_size))
            backend.scan_steps = 1 if self.nan == "skip" else backend.scan_steps
        backend.bind(
            algorithm,
            self.info,
            mask=scenario.mask,
            pointwise=self.pointwise,
            grad_clip=self.grad_clip,
            nan=self.nan,
        )
        outputs = backend.n_outputs(first.x[:1])
        if outputs < scenario.n_classes and self.pointwise is cross_entropy:
            raise ValueError(
                f"the model has {outputs} outputs, the scenario {scenario.n_classes} classes"
            )
        spec = algorithm.memory_spec(self.info)
        self.spec, self.slots = spec, None
        if spec is not None:
            if spec.capacity > sum(sizes):
                warnings.warn(
                    f"memory of {spec.capacity} samples is larger than the {sum(sizes)} of all tasks",
                    UserWarning,
                    stacklevel=3,
                )
            self.slots = Slots(spec.capacity, spec.policy, self.seed, scenario.n_classes)
        self.tools = Tools(
            backend.ops,
            backend.model,
            self.info,
            scenario,
            backend.mask,
            self.pointwise,
            self.slots,
            lambda kind, temperature: backend.make_sums(kind, temperature, self.tools.masked),
        )
        n = len(scenario)
        self.matrix = np.full((n, n), np.nan)
        self.initial = np.full(n, np.nan)
        self.losses: list[float] = []
        self.anytime: list[tuple[int, int, list[float]]] = []
        self._fingerprint = ""
        self._tests = None
        self.emit("on_after_setup")
        if self._pending is not None:
            self.restore(*self._pending)
            self._pending = None

    @property
    def fingerprint(self) -> str:
        """The scenario's fingerprint."""
        if not self._fingerprint and self.scenario is not None:
            self._fingerprint = self.scenario.fingerprint()
        return self._fingerprint

    def fit(
        self,
        scenario: Scenario | Iterable[Task],
        epochs: int | Sequence[int] = 1,
        *,
        stop_after: int | None = None,
    ) -> Result:
        """Train on every task in turn, evaluating on all after each; resumes where it stands.

        Args:
            scenario: the stream.
            epochs: per task, or one number for all.
            stop_after: return after that many tasks; calling ``fit`` again goes on.

        Raises:
            FloatingPointError: a loss that is not finite (``nan="raise"``).
        """
        self.setup(scenario)
        assert self.scenario is not None
        n = len(self.scenario)
        counts = list(epochs) if isinstance(epochs, Sequence) else [operator.index(epochs)] * n
        if len(counts) != n or min(counts, default=0) < 0:
            raise ValueError(f"epochs must be an integer >= 0, or {n} of them, got {epochs!r}")
        rng, failed = torch.get_rng_state(), True
        self.emit("on_before_fit")
        try:
            if np.isnan(self.initial).any():
                self.initial = self.evaluate()
            while self.position["task"] < (n if stop_after is None else min(stop_after, n)):
                task = self.position["task"]
                self.fit_task(task, counts[task])
            self.emit("on_after_fit")
            failed = False
        finally:
            self.emit("on_before_teardown", failed=failed)
            self.emit("on_after_teardown", failed=failed)
            torch.set_rng_state(rng)
        return self.result()

    def result(self) -> Result:
        """Return the result so far."""
        return Result(
            self.matrix.copy(),
            self.initial.copy(),
            list(self.losses),
            list(self.anytime),
            self.fingerprint,
        )

    def observe(self, x: Any, y: Any, task: int | None = None) -> float:
        """Take one step on a batch of at most ``batch_size`` samples (online learning); returns the loss.

        Needs ``setup(scenario)``, which says how many tasks and classes there will be and holds the data on
        which a task is consolidated. ``task`` must be given in task-incremental scenarios. A larger number ends
        the task in progress (see :meth:`end_task`) and starts the new one.
        """
        return online.observe(self, x, y, task)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (tree of arrays, JSON-able header): all that a run needs to go on bit by bit."""
        return resume.state_of(self)

    def load_state_dict(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        resume.restore(self, *state)

    def restore(self, tree: dict[str, Any], header: dict[str, Any], *, strict: bool = True) -> None:
        """Go back to a checkpoint; RuntimeError where it is of another run, unless ``strict=False``."""
        resume.restore(self, tree, header, strict=strict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically and without pickle."""
        checkpoint.write(path, *self.state_dict())

    load = resume.Load()
