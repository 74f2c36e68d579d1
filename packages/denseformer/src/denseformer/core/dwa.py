"""The weights of all depth-weighted averages of one network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from denseformer.core import layouts
from denseformer.core.engine import scatter
from denseformer.core.geometry import Geometry, describe_code
from denseformer.core.plan import Plan, plan_of
from denseformer.core.run import DepthRun, check_stream

BACKENDS = ("auto", "eager", "reference")


class KeepsDtype(nn.Module):
    """A module whose floating-point tensors move between devices but keep their type under casts."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            same = moved.dtype == t.dtype or not t.is_floating_point()
            return moved if same else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]


class DWA(KeepsDtype):
    """Depth-weighted averages after the blocks of a stack: ``Y_i = Σ_{j in S_i} α_ij X_j``.

    X_0 is the embedding, X_i the output of block i, Y_i the input of block i + 1 (paper, section 3). At
    initialisation ``α_ii = 1`` and all others 0: the network is the plain one, bit for bit.

    Args:
        depth: number of blocks d.
        dilation: k; row i reads every k-th representation, counted back from i.
        period: p; only every p-th block is followed by an average.
        pattern: ``"dilated"``, ``"last_k"``, ``"final"`` ("Connect to Last") or a boolean mask (d, d + 1).
        last_k: K of ``"last_k"``: row i reads X_0 and the last K of X_1..X_i, min(i, K) + 1 weights.
        groups: g of the authors' experiment code; see :class:`Geometry`.
        init_scale: initial value of the other weights (the published "Connect to Last" run: 1e-4).
        backend: ``"auto"`` (the fused autograd, or plain operations under torch.compile and torch.func),
            ``"eager"`` (the same, named), ``"reference"`` (plain operations always, a term at a time).
        device: of the weights.
        dtype: float32 or float64. Casts of the module leave it as it is: in bfloat16 the spacing near 1
            (0.004 to 0.008) would swallow an optimizer's step of 0.001.

    Attributes:
        weight: all weights in one vector (nnz,), row after row, ascending j within a row.
        rows: the depths, from 1, that have an average.
        geometry: seven integers that a state dict carries and that loading compares.

    Raises:
        TypeError, ValueError: see :class:`Geometry`; also for a dtype or backend that is not listed.

    A period beyond the depth warns: there is no average at all then.

    >>> import torch
    >>> dwa = DWA(depth=3, dilation=2)
    >>> [dwa.sources(i) for i in dwa.rows]
    [(1,), (0, 2), (1, 3)]
    >>> x = torch.ones(1, 2, 4)
    >>> run = dwa.begin(x)
    >>> for block in (torch.sin, torch.cos, torch.tanh):
    ...     x = run(block(x))
    >>> bool(torch.equal(x, torch.ones(1, 2, 4).sin().cos().tanh()))
    True
    """

    weight: nn.Parameter
    geometry: Tensor

    def __init__(
        self,
        depth: int,
        dilation: int = 1,
        period: int = 1,
        *,
        pattern: str | Tensor = "dilated",
        last_k: int = 4,
        groups: int = 1,
        init_scale: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype must be torch.float32 or torch.float64, got {dtype}: near 1 the steps of a "
                "16-bit type are larger than an optimizer's"
            )
        self.spec = Geometry.build(depth, dilation, period, pattern, last_k, groups)
        self.plan: Plan = plan_of(self.spec)
        if not self.spec.rows:
            warnings.warn(
                f"period={period} is beyond depth={depth}: no average at all, a plain network",
                stacklevel=2,
            )
        self.backend = backend
        self.init_scale = float(init_scale)
        self.weight = nn.Parameter(torch.empty(self.spec.nnz, device=device, dtype=dtype))
        self.register_buffer("geometry", torch.empty(7, dtype=torch.long, device=device))
        self.reset_parameters()

    @classmethod
    def build(cls, spec: Geometry, **kwargs: Any) -> DWA:
        """Make the averages of a geometry; further keywords as for the class.

        >>> DWA.build(Geometry(4, dilation=2))
        DWA(2x1, depth 4, 4 rows, 8 weights)
        """
        pattern: str | Tensor = spec.pattern
        if spec.mask is not None:
            pattern = torch.zeros(spec.depth, spec.depth + 1, dtype=torch.bool)
            for line, sources in zip(pattern, spec.mask, strict=True):
                line[list(sources)] = True
        return cls(
            spec.depth,
            spec.dilation,
            spec.period,
            pattern=pattern,
            last_k=spec.last_k,
            groups=spec.groups,
            **kwargs,
        )

    def reset_parameters(self) -> None:
        """Make every average the identity (others at ``init_scale``); also restores ``geometry``."""
        with torch.no_grad():
            self.weight.fill_(self.init_scale)
            ends = torch.tensor(self._ends(), dtype=torch.long, device=self.weight.device)
            self.weight[ends] = 1.0
            self.geometry.copy_(torch.tensor(self.spec.code()))

    def _ends(self) -> list[int]:
        found, total = [], 0
        for i in self.spec.rows:
            total += len(self.spec.sources(i))
            found.append(total - 1)
        return found

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.spec.depth

    @property
    def rows(self) -> tuple[int, ...]:
        """Depths, from 1, that have an average."""
        return self.spec.rows

    def sources(self, i: int) -> tuple[int, ...]:
        """Return S_i, the representations that row i reads; empty where depth i has no average."""
        return self.spec.sources(i)

    def row(self, i: int) -> Tensor:
        """Return the weights of depth i, a view of shape (\\|S_i\\|,) that autograd follows.

        Raises:
            ValueError: depth i has no average.
        """
        if i not in self.spec.rows:
            raise ValueError(f"depth {i} has no average; the rows are {self.spec.rows}")
        start = sum(len(self.spec.sources(m)) for m in self.spec.rows if m < i)
        return self.weight[start : start + len(self.spec.sources(i))]

    def matrix(self) -> Tensor:
        """Return α as a detached matrix (depth, depth + 1), zero outside S_i; row i - 1 is depth i."""
        weight = self.weight.detach()
        full = weight.new_zeros(self.depth, self.depth + 1)
        if self.rows:
            full[[i - 1 for i in self.rows]] = scatter(weight, self.plan)
        return full

    def begin(
        self, x0: Tensor, *, partials: Sequence[Tensor] | None = None, recompute: bool = False
    ) -> DepthRun:
        """Start one forward pass from the embedding X_0; nothing of it stays on the module.

        Args:
            x0: any shape, floating point.
            partials: what the previous pipeline stage sent; only for :class:`StageDWA`.
            recompute: keep what is needed to compute every Y again instead of saving it; see
                :func:`denseformer.recomputing`.

        Raises:
            TypeError: ``x0`` is not a floating-point tensor.
            ValueError: partial sums do not fit the stage.
        """
        made = self(x0, tuple(partials or ()), recompute)  # a call, so that FSDP's hooks run
        assert isinstance(made, DepthRun)
        return made

    def forward(
        self, x0: Tensor, partials: Sequence[Tensor] = (), recompute: bool = False
    ) -> DepthRun:
        """Return the run; :meth:`begin` is the documented way to it."""
        check_stream(x0, "x0")
        if partials:
            raise ValueError(
                "this DWA holds the whole network and takes no partials; see denseformer.pipeline"
            )
        return DepthRun(
            self.plan,
            self.weight,
            x0,
            [x0],
            reference=self.backend == "reference",
            recompute=recompute,
        )

    def to_reference_state_dict(self, layout: str = "alphas") -> dict[str, Tensor]:
        """Return the weights under the keys of the authors' code.

        Args:
            layout: ``"alphas"``, their package: ``alphas.{i}.weight`` (1, n) for block i from 0; or
                ``"weights"``, their experiment code: ``weights.{m}.weight`` for group m from 0.

        Raises:
            ValueError: another layout.
        """
        return layouts.to_reference(self.spec, self.weight.detach(), layout)

    def extra_repr(self) -> str:
        """Describe the geometry."""
        return str(self.spec)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any],
        strict: bool, missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        layouts.from_reference(self.spec, state_dict, prefix, error_msgs)
        stored = state_dict.get(prefix + "geometry")
        code = self.spec.code()
        if stored is None and prefix + "weight" in state_dict:
            state_dict[prefix + "geometry"] = torch.tensor(code)
        elif stored is not None and stored.tolist() != code:
            error_msgs.append(
                f"the stored DWA has {describe_code(stored.tolist())}, this one has {describe_code(code)}"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
