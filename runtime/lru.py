"""`LruBytes`: what was used most recently, up to a size in bytes."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class LruBytes(Generic[T]):
    """A dictionary of bounded size in bytes; `sizeof` gives an entry's."""

    def __init__(self, limit: int, sizeof: Callable[[T], int]) -> None:
        self._limit, self._sizeof = limit, sizeof
        self._entries: collections.OrderedDict[str, T] = collections.OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> T | None:
        """The entry, which is then the most recently used."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: str, entry: T) -> None:
        """Add an entry; one that is larger than all the room is kept alone."""
        self.pop(key)
        self._entries[key] = entry
        self.bytes += self._sizeof(entry)
        while self.bytes > self._limit and len(self._entries) > 1:
            self.pop(next(iter(self._entries)))

    def pop(self, key: str) -> bool:
        """Remove an entry; whether it was there."""
        if key not in self._entries:
            return False
        self.bytes -= self._sizeof(self._entries.pop(key))
        return True
