"""Power steps of equally shaped layers one after the other, and as one grouped convolution over all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import options, report, save, timed
from torch.nn import functional as F

# (channels, size, how many): the 3x3 convolutions of one shape in a ResNet-18 on 32x32
SHAPES = [(64, 32, 4), (128, 16, 3), (256, 8, 3), (512, 4, 3)]


def cases(channels: int, size: int, count: int) -> dict[str, Callable[[], object]]:
    weights = [torch.randn(channels, channels, 3, 3) for _ in range(count)]
    vectors = [torch.randn(1, channels, size, size) for _ in range(count)]

    def step(u: torch.Tensor, w: torch.Tensor, groups: int = 1) -> torch.Tensor:
        v = F.conv_transpose2d(u, w, padding=1, groups=groups)
        return F.conv2d(v, w, padding=1, groups=groups)

    stacked, together = torch.cat(weights), torch.cat(vectors, 1)
    one = torch.cat([step(u, w) for u, w in zip(vectors, weights, strict=True)], 1)
    torch.testing.assert_close(step(together, stacked, count), one, rtol=1e-3, atol=1e-2 * channels)
    return {
        "one by one": lambda: [step(u, w) for u, w in zip(vectors, weights, strict=True)],
        "grouped": lambda: step(together, stacked, count),
        "grouped, weights stacked anew": lambda: step(together, torch.cat(weights), count),
    }


def main() -> None:
    args = options(__doc__ or "")
    found = {}
    for shape in SHAPES:
        times = timed(cases(*shape), args.repeats)
        report(
            f"{shape[2]} layers of {shape[0]} channels on {shape[1]}x{shape[1]}",
            times,
            "one by one",
            args,
        )
        found["x".join(map(str, shape))] = times
    save(args, {"times_ms": found})


if __name__ == "__main__":
    main()
