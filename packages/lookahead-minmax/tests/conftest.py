"""Small games whose iterates are known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer


def _mend_torchvision() -> torch.library.Library | None:
    """Declare two operators that the public index's torchvision wants at import beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_LIB = _mend_torchvision()

OptimizerFactory = Callable[[list[Tensor]], Optimizer]


class BilinearGame:
    """f(x, y) = x y with x minimising and y maximising, each with an optimizer of its own."""

    def __init__(
        self,
        make: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        start: tuple[float, float] = (1.0, 0.0),
        dtype: torch.dtype = torch.float64,
        **options: object,
    ) -> None:
        options.setdefault("lr", 0.5)
        self.x = torch.tensor(start[0], dtype=dtype, requires_grad=True)
        self.y = torch.tensor(start[1], dtype=dtype, requires_grad=True)
        self.opt_x = make([self.x], **options)
        self.opt_y = make([self.y], **options)

    @property
    def players(self) -> dict[str, Optimizer]:
        return {"x": self.opt_x, "y": self.opt_y}

    def point(self) -> tuple[float, float]:
        return self.x.item(), self.y.item()

    def fill(self) -> None:
        """Fill both gradients at the present point; y descends on -f."""
        self.x.grad = self.y.detach().clone()
        self.y.grad = -self.x.detach().clone()

    def simultaneous(self) -> None:
        self.fill()
        self.opt_x.step()
        self.opt_y.step()

    def y_step(self) -> None:
        self.y.grad = -self.x.detach().clone()
        self.opt_y.step()

    def x_step(self) -> None:
        self.x.grad = self.y.detach().clone()
        self.opt_x.step()

    def alternating(self, ratio: int = 1) -> None:
        for _ in range(ratio):
            self.y_step()
        self.x_step()
