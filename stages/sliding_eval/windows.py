"""The window plan: which tokens each forward pass sees and which targets it scores.

Windows start at 0, S, 2S, ... The first scores all its targets, every other only its last S, and the last one what is left of the stream:
each target is scored exactly once, by the first window that reaches it, and none is dropped at the tail.
"""

from typing import NamedTuple


class Window(NamedTuple):
    """Inputs are tokens[start : end]; targets first ... end - 1 are scored (target i is tokens[i + 1])."""

    start: int
    first: int
    end: int


def window_of(target: int, window: int, stride: int) -> int:
    """The start of the window that scores a target."""
    return 0 if target < window else ((target - window) // stride + 1) * stride


def plan(first: int, end: int, window: int, stride: int) -> list[Window]:
    """The windows that score the targets first ... end - 1 of a stream, in order.

    A stretch that begins or ends inside a window's targets scores only its share of them.

    >>> plan(0, 7, window=4, stride=2)
    [Window(start=0, first=0, end=4), Window(start=2, first=4, end=6), Window(start=4, first=6, end=7)]
    """
    windows = []
    target = first
    while target < end:
        start = window_of(target, window, stride)
        stop = min(start + window, end)
        windows.append(Window(start, target, stop))
        target = stop
    return windows
