"""Which patterns name this SPIFFE ID? Answered without looking at each of them."""

from __future__ import annotations

from typing import Generic, TypeVar

from carnet.spiffe import SpiffeID, SpiffeIDPattern

__all__ = ["PatternIndex"]

_Item = TypeVar("_Item")


class _Node(Generic[_Item]):
    """A place between two segments: what ends here, what takes all that follows, and where it goes on."""

    __slots__ = ("branches", "ending", "rest")

    def __init__(self) -> None:
        self.branches: dict[str, _Node[_Item]] = {}
        self.ending: list[_Item] = []
        self.rest: list[_Item] = []


class PatternIndex(Generic[_Item]):
    """Items by SPIFFE ID pattern, all of one trust domain, which the caller compares.

    Patterns without a wildcard are in a dict. The others are in a tree by segment, and a look-up follows the branches
    of the segment and of ``*``: at most as many as there are patterns that begin like the SPIFFE ID.
    """

    def __init__(self) -> None:
        self._exact: dict[tuple[str, ...], list[_Item]] = {}
        self._root: _Node[_Item] = _Node()

    def add(self, pattern: SpiffeIDPattern, item: _Item) -> None:
        """Add `item` under `pattern`."""
        if pattern.exact is not None:
            self._exact.setdefault(pattern.segments, []).append(item)
            return
        node = self._root
        *segments, last = pattern.segments
        for segment in segments:
            node = node.branches.setdefault(segment, _Node())
        if last == "**":
            node.rest.append(item)
        else:
            node.branches.setdefault(last, _Node()).ending.append(item)

    def find(self, spiffe_id: SpiffeID) -> list[_Item]:
        """Return the items whose pattern matches `spiffe_id`, in no order."""
        found = list(self._exact.get(spiffe_id.segments, ()))
        nodes = [self._root]
        for segment in spiffe_id.segments:
            following: list[_Node[_Item]] = []
            for node in nodes:
                found += node.rest  # This segment is the one that ** wants at least.
                # A segment of a SPIFFE ID is never "*" itself, so the two branches differ.
                following += [node.branches[key] for key in (segment, "*") if key in node.branches]
            if not following:
                return found
            nodes = following
        for node in nodes:
            found += node.ending
        return found
