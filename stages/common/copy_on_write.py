"""Copy-on-write: large state that forks of a scorer share until one of them changes it.

An audit forks a scorer thousands of times, reads a few predictions of each fork and drops it. A
copy is made only for a fork that is alive, and only when somebody writes.
"""

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakSet

T = TypeVar("T")


class CopyOnWrite(Generic[T]):
    """A reference to an object that several forks share; each fork has a reference of its own."""

    def __init__(self, value: T, copy: Callable[[T], T]) -> None:
        self.value = value  # for reading only
        self._copy = copy
        self._references: WeakSet[CopyOnWrite[T]] = WeakSet([self])  # to the same object

    def fork(self) -> "CopyOnWrite[T]":
        """Another reference to the same object."""
        twin = CopyOnWrite(self.value, self._copy)
        twin._references = self._references
        self._references.add(twin)
        return twin

    def writable(self) -> T:
        """The object for writing: a copy of it while other references are alive."""
        if len(self._references) > 1:
            self._references.remove(self)
            self.value = self._copy(self.value)
            self._references = WeakSet([self])
        return self.value
