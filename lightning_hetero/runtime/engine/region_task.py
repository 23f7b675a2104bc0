"""What is to be done in one call of a region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lightning_hetero.runtime.engine.batch import Cut
from lightning_hetero.runtime.engine.batch_norm import Deferred
from lightning_hetero.runtime.engine.surroundings import Surroundings
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.frozen import Frozen


class Again(NamedTuple):
    """What a forward depends on besides its inputs, for another run in the backward.

    Attributes:
        unchanged: Parameters and buffers that have to be what they were.
        surroundings: Of the modules before the first run.
        frozen: Functions among the inputs, as they were then.
    """

    unchanged: Sequence[Tensor]
    surroundings: Surroundings
    frozen: Frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionTask:
    """What is to be done in one call.

    Attributes:
        number: Number of the call; workers take tasks of earlier calls first.
        name: Name of the region, for messages.
        forward: The region's code, as lanes run it.
        whole: Runs the region whole, for a backward that has to be differentiable itself.
        cut: Where inputs are cut.
        rows: Rows of each micro-batch.
        given: The inputs.
        seed: Where random numbers begin; None if none are drawn.
        own_code_draws: Whether the region's own code, outside of units, draws random numbers.
        deferred: Batch normalisations that use the statistics of micro-batches.
        again: What another run of the forward needs; None where nothing is recorded.
        rematerialized: Where the forward is to keep no graph, the parameters that need a gradient; None keeps it.
        traced: Places of the outputs that have a graph; only needed with `rematerialized`.
        buffers: The buffers of the region.
        upstream: Places of the outputs of which other outputs are made.
        views: Places of outputs that are parts of other outputs in memory, with the places of these.
    """

    number: int
    name: str
    forward: Callable[..., Any]
    whole: Callable[..., Any]
    cut: Cut
    rows: Sequence[int]
    given: Tree
    seed: int | None
    own_code_draws: bool
    deferred: Deferred
    again: Again | None
    rematerialized: Sequence[Tensor] | None
    traced: Sequence[int] | None
    buffers: Sequence[Tensor]
    upstream: Sequence[int] = ()
    views: Sequence[tuple[int, int]] = ()
