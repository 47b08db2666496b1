"""The window plan: which tokens each forward pass reads, and which targets it scores.

Windows of W tokens start at 0, S, 2S, ... The first scores all its targets, every later one only
its last S, and the last one what is left of the stream. Each target is scored exactly once, by the
first window that reaches it, and none is dropped at the end.

    W = 4, S = 2        tokens   0 1 2 3 4 5 6
    window 0            reads    . . . .          scores targets 0 1 2 3
    window 1            reads        . . . .      scores targets 4 5
    window 2            reads            . . .    scores target 6
"""

from typing import NamedTuple


class Window(NamedTuple):
    """A window reads tokens[start : end] and scores targets first ... end - 1 (target i is tokens[i + 1])."""

    start: int
    first: int
    end: int


def window_start(target: int, window: int, stride: int) -> int:
    """The start of the window that scores a target."""
    return 0 if target < window else ((target - window) // stride + 1) * stride


def plan_windows(first: int, end: int, window: int, stride: int) -> list[Window]:
    """The windows that score targets first ... end - 1 of a stream, in order.

    Where the range begins or ends inside a window's targets, that window scores only those in range.

    >>> plan_windows(0, 7, window=4, stride=2)
    [Window(start=0, first=0, end=4), Window(start=2, first=4, end=6), Window(start=4, first=6, end=7)]
    """
    windows = []
    target = first
    while target < end:
        start = window_start(target, window, stride)
        stop = min(start + window, end)
        windows.append(Window(start, target, stop))
        target = stop
    return windows
