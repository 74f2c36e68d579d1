"""A progress bar on stderr, tqdm's where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    progress: bool | Callable[[int, int], None], total: int
) -> Iterator[Callable[[int], None] | None]:
    """Return what the engine calls after each chunk: a bar, the caller's function, or nothing.

    `total` is an estimate for methods that sample or pass once more over some tensors; the amount that
    is shown never exceeds it.
    """
    if progress is False:
        yield None
        return
    done = 0
    if progress is True:
        try:
            from tqdm import tqdm
        except ImportError:
            bar: Callable[[int, int], None] = _Bar()
        else:
            with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr) as meter:
                yield lambda count: (meter.update(min(count, total - meter.n)), None)[1]
            return
    else:
        bar = progress

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        bar(done, total)

    yield advance
    if progress is True:
        print(file=sys.stderr)


class _Bar:
    """A percentage on one line of stderr."""

    def __init__(self) -> None:
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        percent = min(100, 100 * done // max(total, 1))
        if percent != self._shown:
            self._shown = percent
            print(f"\r{percent:3d} %", end="", file=sys.stderr, flush=True)
