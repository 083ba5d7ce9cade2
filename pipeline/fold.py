"""The fold: what the parts of a table become together, always by the same tree, in one process or in Ray tasks.

The parts are taken in groups of FAN_IN neighbours. What a group becomes is a function of its files alone, so it may be
found anywhere; what follows from the groups, in their order, is done by the process that folds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from pipeline.runs import RunError
from pipeline.storage import Location

FAN_IN = 64
"""Parts of a group, and states merged at once: always the same tree, whatever the number of workers."""

T = TypeVar("T")

Each = Callable[[Callable[[list[Location]], Any], Sequence[list[Location]]], Iterable[Any]]
"""What `map` does, or cluster.in_tasks: the results of a function on each group, in order."""


class Parts(list[Location]):
    """The committed parts of a table, in order."""

    def __init__(self, parts: Iterable[Location], each: Each = map) -> None:
        super().__init__(parts)
        self.each = each

    def groups(self, do: Callable[[list[Location]], T]) -> Iterator[T]:
        """What `do` makes of each FAN_IN neighbours, in order. It is sent to other processes where `each` says so."""
        return iter(self.each(do, [self[start : start + FAN_IN] for start in range(0, len(self), FAN_IN)]))


def fold_tree(parts: Parts, read: Callable[[Location], T | None], merge: Callable[[list[T]], T]) -> T:
    """Merge the states of all parts: those of a group, then FAN_IN neighbours at a time, level by level.

    Args:
        read: part -> its state; None where none of its images could be read.
        merge: states in order -> their state; of a single one the same.

    Raises: RunError where no part has a state.
    """
    states = parts.groups(partial(_merge_group, read, merge))
    return tree((state for state in states if state is not None), merge, FAN_IN)


def _merge_group(
    read: Callable[[Location], T | None], merge: Callable[[list[T]], T], parts: list[Location]
) -> T | None:
    states = [state for state in map(read, parts) if state is not None]
    return merge(states) if states else None


def tree(states: Iterator[T], merge: Callable[[list[T]], T], fan_in: int) -> T:
    """Merge states in order, `fan_in` neighbours at a time, level by level; holds fewer than that of each level.

    Raises: RunError for no states.
    """
    levels: list[list[T]] = []
    for state in states:
        _push(levels, 0, state, merge, fan_in)
    if not levels:
        raise RunError("not one image could be read: there is nothing to fold; see results/skipped")
    for level in range(len(levels)):
        if levels[level] and (level + 1 < len(levels) or len(levels[level]) > 1):
            _push(levels, level + 1, merge(levels[level]), merge, fan_in)
            levels[level] = []
    return levels[-1][0]


def _push(levels: list[list[T]], level: int, state: T, merge: Callable[[list[T]], T], fan_in: int) -> None:
    if level == len(levels):
        levels.append([])
    levels[level].append(state)
    if len(levels[level]) == fan_in:
        _push(levels, level + 1, merge(levels[level]), merge, fan_in)
        levels[level] = []
