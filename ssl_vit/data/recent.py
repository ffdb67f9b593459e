"""Recently used things, kept up to a number and a size: open files, decoded parts of them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """The most recently used things, at most ``count`` and ``size`` bytes, but always the last one.

    ``drop`` is called with each that is no longer kept.
    """

    def __init__(
        self, count: int, size: int, drop: Callable[[T], object] = lambda value: None
    ) -> None:
        self.count, self.size, self.drop = count, size, drop
        self.kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self.held = 0

    def find(self, key: Hashable) -> T | None:
        """Value kept by this key, now the last used; None: there is none."""
        if key not in self.kept:
            return None
        self.kept.move_to_end(key)
        return self.kept[key][0]

    def keep(self, key: Hashable, value: T, size: int) -> None:
        """Keep a thing of ``size`` bytes that is not kept yet."""
        self.kept[key] = value, size
        self.held += size
        while len(self.kept) > 1 and (len(self.kept) > self.count or self.held > self.size):
            _, (old, its) = self.kept.popitem(last=False)
            self.held -= its
            self.drop(old)

    def clear(self) -> None:
        """Keep nothing."""
        while self.kept:
            _, (old, _) = self.kept.popitem()
            self.drop(old)
        self.held = 0
