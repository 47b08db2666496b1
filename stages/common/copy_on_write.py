"""Something large that forks of a scorer have in common until one of them changes it.

An audit forks a scorer thousands of times, looks at a few predictions of each fork and lets it go: copies are made for forks that live,
and only when somebody writes.
"""

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakSet

T = TypeVar("T")


class Shared(Generic[T]):
    """One holder's hand on a value; every scorer that has the value has a hand of its own."""

    def __init__(self, value: T, copy: Callable[[T], T]) -> None:
        self.value = value  # to read
        self._copy = copy
        self._holders: WeakSet[Shared[T]] = WeakSet([self])

    def fork(self) -> "Shared[T]":
        """Another hand on the same value."""
        twin = Shared(self.value, self._copy)
        twin._holders = self._holders
        self._holders.add(twin)
        return twin

    def own(self) -> T:
        """The value to change: a copy where another holder lives."""
        if len(self._holders) > 1:
            self._holders.remove(self)
            self.value, self._holders = self._copy(self.value), WeakSet([self])
        return self.value
