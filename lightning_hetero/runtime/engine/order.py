"""What micro-batches of a step have to use one after the other."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Order:
    """Under which keys that is noted, as the rehearsal has seen it; see `Turnstile`.

    Attributes:
        once: Keys that each micro-batch passes once: `id` of metrics, and those of units that keep state.
        keys: Of units that keep state, by number; units that share it have one key.
        shared: `id` of the modules in them that do.
    """

    once: frozenset[Hashable] = frozenset()
    keys: Mapping[int, Hashable] = field(default_factory=dict)
    shared: frozenset[int] = frozenset()


NO_ORDER = Order()


def order_of(passed: Sequence[Sequence[Hashable]], stateful: Mapping[int, set[int]]) -> Order:
    """What was used in order by each micro-batch, where units that have a module in common count as one.

    Args:
        passed: Keys of metrics and numbers of units, one for each call, for each micro-batch.
        stateful: `id` of modules that keep state, for each of these units.
    """
    group: dict[int, int] = {}  # of modules
    for modules in stateful.values():
        known = {group.get(module, module) for module in modules}
        new = min(known)
        group = {module: new if old in known else old for module, old in group.items()}
        group.update(dict.fromkeys(modules, new))
    keys: dict[Any, Hashable] = {number: ("of units", group[min(modules)]) for number, modules in stateful.items()}
    each = [[keys.get(key, key) for key in called] for called in passed]
    once = frozenset(key for key in set().union(*each) if all(called.count(key) == 1 for called in each))
    return Order(once, keys, frozenset(group))
