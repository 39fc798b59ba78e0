"""KV blocks of one engine: a count, or a count with a prefix cache.

The cache follows vLLM's: blocks are known by their content, shared by count of users, and a block that nobody uses
keeps its content until it is handed out again, least recently used first and a sequence's tail before its head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

_Key = int | tuple[int, int]


@dataclass(slots=True)
class Holder:
    """A sequence as the pool sees it. `shared` counts its leading blocks that others may use too."""

    number: int
    prefix_blocks: tuple[int, ...] = ()
    shared: int = 0

    def keys(self, first: int, end: int) -> Iterator[_Key]:
        """The contents of its blocks: a given prefix block, else one that only this sequence can have."""
        prefix = self.prefix_blocks
        for index in range(first, end):
            yield prefix[index] if index < len(prefix) else (self.number, index)


class BlockPool:
    """Blocks counted, without a prefix cache."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free = capacity

    def hits(self, _holder: Holder, _most: int) -> tuple[int, int]:
        """Leading blocks of a sequence that are cached, at most `_most`, and how many of those nobody uses."""
        return 0, 0

    def take(self, blocks: int) -> None:
        """Hand out free blocks; the caller has looked at `free`."""
        self.free -= blocks

    def revive(self, _holder: Holder, _blocks: int) -> None:
        """Bring cached leading blocks (see `hits`) into use."""

    def computed(self, _holder: Holder, _full_blocks: int) -> None:
        """The first `_full_blocks` blocks have their content: others may share those of a given prefix."""

    def release(self, _holder: Holder, blocks: int, _full_blocks: int) -> None:
        """Give all `blocks` of a sequence back, of which the first `_full_blocks` have their content."""
        self.free += blocks


class CachingPool(BlockPool):
    """Blocks with a prefix cache. `free` includes cached blocks that nobody uses."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._users: dict[_Key, int] = {}  # given prefix blocks in use
        self._unused: OrderedDict[_Key, None] = OrderedDict()  # free, content kept, least recently used first

    def hits(self, holder: Holder, most: int) -> tuple[int, int]:
        found = unused = 0
        for key in holder.keys(0, most):
            if key in self._unused:
                unused += 1
            elif key not in self._users:
                break
            found += 1
        return found, unused

    def take(self, blocks: int) -> None:
        self.free -= blocks
        for _ in range(len(self._unused) - self.free):
            self._unused.popitem(last=False)

    def revive(self, holder: Holder, blocks: int) -> None:
        for key in holder.keys(0, blocks):
            if key in self._unused:
                del self._unused[key]
                self.free -= 1
            if not isinstance(key, tuple):
                self._users[key] = self._users.get(key, 0) + 1
        holder.shared = min(blocks, len(holder.prefix_blocks))

    def computed(self, holder: Holder, full_blocks: int) -> None:
        end = min(full_blocks, len(holder.prefix_blocks))
        for key in holder.keys(holder.shared, end):
            if key in self._users:
                return  # another sequence computed the same content meanwhile: this copy stays private
            if key in self._unused:
                # The same content again: the older copy is the one to be handed out first, without its name.
                del self._unused[key]
            self._users[key] = 1
            holder.shared += 1

    def release(self, holder: Holder, blocks: int, full_blocks: int) -> None:
        shared = holder.shared
        self.free += blocks - shared
        for index in range(full_blocks - 1, shared - 1, -1):
            key = (holder.number, index)
            self._unused[key] = None
            self._unused.move_to_end(key)
        for index in range(shared - 1, -1, -1):
            key_id = holder.prefix_blocks[index]
            users = self._users[key_id] - 1
            if users:
                self._users[key_id] = users
            else:
                del self._users[key_id]
                self._unused[key_id] = None
                self.free += 1
        holder.shared = 0
