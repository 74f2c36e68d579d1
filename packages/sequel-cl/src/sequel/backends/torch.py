"""PyTorch's side: the training state of one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sequel.algorithms.base import Algorithm, Info, State
from sequel.backends.preload import wanted
from sequel.backends.scaling import LossScale
from sequel.backends.torch_model import TorchModel
from sequel.engine import empty_memory, one_step
from sequel.fisher import Layers, Sums
from sequel.ops.base import Tree
from sequel.ops.torch import TorchOps

if TYPE_CHECKING:
    from sequel.engine import Tools
    from sequel.scenarios import Data

__all__ = ["TorchBackend"]


class SkippedStep(Exception):
    """The gradients of a step are not finite and ``nan="skip"``: nothing has changed yet."""


class TorchBackend:
    """Parameters, optimizer and algorithm state of one run under PyTorch."""

    name = "torch"

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        features: str | None = None,
        device: torch.device | str | None = None,
        amp: str | None = None,
        compile: bool = False,
        preload: bool | str = "auto",
    ) -> None:
        if device is not None:
            module.to(device)
        first = next(module.parameters())
        self.ops = TorchOps(first.device)
        self.model = TorchModel(module, self.ops, encoder=features, compile=compile, amp=amp)
        self.optimizer = optimizer
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = {id(p): name for name, p in self.model.live.items()}
        extra = held - {id(p) for p in module.parameters()}
        if extra or set(mine) - held:
            missing = [name for key, name in mine.items() if key not in held]
            raise ValueError(
                f"optimizer must hold exactly the model's trainable parameters: {len(extra)} of its "
                f"parameters are not the model's, {missing} are missing"
            )
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.lr: float | None = self.base_lrs[0]
        self.state: State = {}
        self.nan = "raise"
        self.plain_sgd = False
        self.preload, self.scale = preload, LossScale() if amp == "fp16" else None
        self.skipped = False

    @property
    def careful(self) -> bool:
        """Tell whether a step may be skipped by itself, so that the host must look after each."""
        return self.scale is not None

    @property
    def params(self) -> Tree:
        """The trained parameters by name."""
        return self.model.live

    def feature_dim(self, x: np.ndarray[Any, Any]) -> int:
        """Return the width of the encoder's output."""
        with torch.no_grad():
            return self.model.features(self.params, self.ops.asarray(x), False).shape[1]

    def n_outputs(self, x: np.ndarray[Any, Any]) -> int:
        """Return the width of the model's output."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self.model.forward(self.params, self.ops.asarray(x), False).shape[-1]

    def bind(self, algorithm: Algorithm, info: Info, **context: Any) -> None:
        """Prepare a run."""
        self.algorithm, self.info = algorithm, info
        like = next(iter(self.params.values()))
        for name, value in algorithm.extra_params(info).items():
            parameter = nn.Parameter(self.ops.asarray(value, like))
            self.model.live[name] = parameter
            group = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
            self.optimizer.add_param_group({**group, "params": [parameter]})
            self.base_lrs.append(float(group["lr"]))
        self.nan, mask = context.pop("nan"), context.pop("mask")
        self.mask = None if mask is None else self.ops.asarray(mask)
        self.context = {**context, "mask": self.mask, "info": info}
        self.spec = algorithm.memory_spec(info)
        self.state = algorithm.init(self.ops, self.params, info)
        if self.spec is not None:
            self.state["memory"] = empty_memory(self.ops, self.spec, info, like)

    def make_sums(self, kind: str, temperature: float, masked: Any) -> Any:
        """Return the function that sums squared per-sample gradients over a chunk."""
        layers = Layers(self.model.module, self.model.live)
        return Sums(self.ops, self.model, kind, temperature, masked, layers)

    # ------------------------------------------------------------------ tasks
    def start_task(self, scale: float, reset: bool) -> None:
        """Set the learning rate and forget the optimizer's moments."""
        if reset:
            self.optimizer.state.clear()
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * scale
        self.lr = self.base_lrs[0] * scale

    def set_params(self, params: Tree) -> None:
        """Write new values into the module, where they are not its own."""
        if params is not self.model.live:
            with torch.no_grad():
                for name, value in params.items():
                    self.model.live[name].copy_(value)

    def hook(self, which: str, task: int, tools: Tools) -> None:
        """Call ``on_task_start`` or ``on_task_end``."""
        fn = getattr(self.algorithm, which)
        self.ops.loss_scale = 1.0
        with torch.no_grad(), self.model.single():
            params, self.state = fn(self.ops, self.params, task, tools, self.state)
            self.set_params(params)

    def load(self, data: Data, pad: int) -> None:
        """Put a task's data on the device; or keep them here, and bring each step's rows."""
        self.host: Data | None = data
        self.data: dict[str, Tensor] = {}
        if wanted(self.preload, data, self._free):
            self.host, self.data = None, self._rows(data)

    def _rows(self, data: Data) -> dict[str, Tensor]:
        return {key: self.ops.asarray(getattr(data, key)) for key in ("x", "y", "t")}

    def _free(self) -> float:
        if self.ops.device.type == "cuda":  # pragma: no cover - needs a GPU
            return float(torch.cuda.mem_get_info(self.ops.device)[0])
        return float("inf")

    def run(
        self, plans: list[dict[str, Any]], task: int, emit: Callable[[str], None] | None = None
    ) -> np.ndarray[Any, Any]:
        """Take the planned steps; returns the losses."""
        if not self.model.module.training:
            self.model.module.train()
        values, self.skipped = [], False
        self.plain_sgd = self._find_plain_sgd()  # callbacks may change the groups between the calls
        for plan in plans:
            self._seed(int(plan["key"][0]) << 16 ^ int(plan["key"][1]))
            arrays = {
                key: self.ops.asarray(value, self._like(value))
                for key, value in plan.items()
                if key != "key" and len(value)
            }
            data = self.data
            if self.host is not None:
                data = self._rows(self.host[plan["idx"]])
                arrays["idx"] = torch.arange(len(plan["idx"]), device=self.ops.device)
            values.append(self._step(data, arrays, task, emit).detach())
        return torch.stack(values).double().cpu().numpy()

    def _step(
        self,
        data: dict[str, Tensor],
        arrays: dict[str, Tensor],
        task: int,
        emit: Callable[[str], None] | None,
    ) -> Tensor:
        if self.scale is not None:
            self.ops.loss_scale = self.scale.value
        skip = self.nan == "skip"
        buffers = [(b, b.clone()) for b in self.model.module.buffers()] if skip else []
        try:
            _, self.state, value = one_step(
                self.algorithm,
                self.ops,
                self.model,
                data,
                arrays,
                self.params,
                self.state,
                self.spec,
                task=task,
                past=task,
                lr=self.lr,
                apply=lambda params, grads: self._apply(params, grads, emit),
                update=self._sgd_update if self.plain_sgd and emit is None else None,
                assign=self._assign,
                **self.context,
            )
        except SkippedStep:
            for buffer, before in buffers:
                buffer.copy_(before)
            self.skipped = True
            if self.scale is not None:
                self.scale.shrink()
                last = self.ops.last_value
                if last is not None and bool(last.isfinite()):
                    return last  # the loss is as it should be, its gradient was scaled too far
            return torch.tensor(float("nan"), device=self.ops.device)
        if self.scale is not None:
            self.scale.grow()
        out: Tensor = value
        return out

    def _seed(self, seed: int) -> None:
        # Not torch.manual_seed: before CUDA is initialised that formats a stack trace each time.
        torch.default_generator.manual_seed(seed)
        if self.ops.device.type == "cuda":  # pragma: no cover - needs a GPU
            torch.cuda.manual_seed(seed)

    def _like(self, value: Any) -> Any:
        return next(iter(self.params.values())) if value.dtype.kind == "f" else None

    def _apply(self, params: Tree, grads: Tree, emit: Callable[[str], None] | None) -> Tree:
        for name, parameter in params.items():
            parameter.grad = grads[name]
        if emit is not None:
            emit("after_backward")
            emit("before_optimizer_step")
        self._skip_unless_finite(grads)
        self.optimizer.step()
        if emit is not None:
            emit("after_optimizer_step")
        return params

    def _find_plain_sgd(self) -> bool:
        """Tell whether a step is -lr times the gradient or the momentum, to single precision or better."""
        first, *rest = self.optimizer.param_groups
        return (
            type(self.optimizer) is torch.optim.SGD
            and not self.optimizer._optimizer_step_post_hooks  # which may move the parameters
            and not (first["weight_decay"] or first["nesterov"] or first["maximize"])
            and all(
                group[key] == first[key]
                for group in rest
                for key in ("lr", "momentum", "weight_decay", "nesterov", "maximize")
            )
            and all(p.dtype in (torch.float32, torch.float64) for p in self.params.values())
        )

    def _sgd_update(self) -> tuple[Tree, float]:
        first, state = self.optimizer.param_groups[0], self.optimizer.state
        moved = {
            name: state[p]["momentum_buffer"] if first["momentum"] else p.grad
            for name, p in self.params.items()
        }
        return moved, -float(first["lr"])

    def _skip_unless_finite(self, tree: Tree) -> None:
        wary = self.nan == "skip" or self.scale is not None
        if wary and not all(bool(leaf.isfinite().all()) for leaf in tree.values()):
            raise SkippedStep

    def _assign(self, params: Tree) -> Tree:
        self._skip_unless_finite(params)
        self.set_params(params)
        return self.model.live

    # ------------------------------------------------------------- evaluation
    def scores(
        self, x: np.ndarray[Any, Any], t: np.ndarray[Any, Any], batch: int
    ) -> np.ndarray[Any, Any]:
        """Return class scores on the host."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            params = self.algorithm.eval_params(self.ops, self.params, self.state)
            out = []
            for at in range(0, len(x), batch):
                part = self.ops.asarray(x[at : at + batch])
                mine = self.ops.asarray(t[at : at + batch])
                logits = self.algorithm.predict(
                    self.ops, params, self.model, part, mine, self.state
                )
                if self.mask is not None:
                    low = torch.tensor(self.ops.neg(logits), dtype=logits.dtype)
                    logits = torch.where(self.mask[mine], logits, low.to(logits.device))
                out.append(logits.cpu().numpy())
        return np.concatenate(out)

    # ------------------------------------------------------------- checkpoint
    def arrays(self) -> dict[str, Any]:
        """Return everything that a run has learned, as a tree of host arrays."""
        moments: dict[str, Any] = {}
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(order):
            for key, value in self.optimizer.state.get(p, {}).items():
                if value is not None:
                    moments[f"{i}/{key}"] = _host(torch.as_tensor(value))
        buffers = {k: _host(v) for k, v in self.model.module.named_buffers()}
        scale = {} if self.scale is None else {"scale": self.scale.array()}
        return {
            **scale,
            "params": {k: _host(v) for k, v in self.params.items()},
            "opt": moments,
            "buffers": buffers,
            "algo": _tree_host(self.state),
        }

    def load_arrays(self, tree: dict[str, Any]) -> None:
        """Restore what :meth:`arrays` returned."""
        with torch.no_grad():
            for name, p in self.params.items():
                _copy_into(p, tree["params"][name])
            for name, b in self.model.module.named_buffers():
                _copy_into(b, tree.get("buffers", {})[name])
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.state.clear()
        for key, value in tree.get("opt", {}).items():
            number, _, field = key.partition("/")
            p = order[int(number)]
            tensor = torch.from_numpy(np.array(value))
            if tensor.dtype == torch.int16 and p.dtype == torch.bfloat16:
                tensor = tensor.view(torch.bfloat16)
            self.optimizer.state[p][field] = tensor if field == "step" else tensor.to(p.device)
        self.state = _tree_device(self.state, tree.get("algo", {}))
        if self.scale is not None and "scale" in tree:
            self.scale.restore(tree["scale"])


def _host(x: Tensor) -> np.ndarray[Any, Any]:
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        x = x.view(torch.int16)
    return np.array(x.numpy())


def _copy_into(target: Tensor, value: np.ndarray[Any, Any]) -> None:
    source = torch.from_numpy(np.array(value))
    if target.dtype == torch.bfloat16:
        source = source.view(torch.bfloat16)
    target.copy_(source)


def _tree_host(tree: Any) -> Any:
    return {k: _tree_host(v) for k, v in tree.items()} if isinstance(tree, dict) else _host(tree)


def _tree_device(like: Any, tree: Any) -> Any:
    if isinstance(like, dict):
        return {key: _tree_device(value, tree.get(key, {})) for key, value in like.items()}
    out = torch.empty_like(like)
    _copy_into(out, tree)
    return out
