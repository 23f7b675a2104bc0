"""What the pieces cost for one micro-batch, in the simple terms of the solvers."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.placement.judge import Judge
from lightning_hetero.plan.forecast import Execution


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceFlow:
    """What passes from one piece to another; -1 stands for the model's own code on the root.

    Attributes:
        source: Index of the piece that makes it.
        target: Index of the piece that takes it.
        size_bytes: How much, for one micro-batch.
        chained: Whether it goes straight from device to device.
    """

    source: int
    target: int
    size_bytes: float
    chained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceCosts:
    """Seconds and bytes of one micro-batch.

    Attributes:
        forward_s: By device, of every piece.
        backward_s: Likewise; zeros without training.
        update_s: Likewise, of the optimizer, once for each batch.
        state_bytes: Of every piece: parameters, gradients (those that wait to be summed too), optimizer state, buffers.
        kept_bytes: Of every piece: what it keeps from forward to backward, inputs included.
        flows: Between different pieces, and between pieces and own code.
        room_bytes: Of every device, for pieces.
        micro_batches: How many micro-batches make up the batch.
    """

    forward_s: dict[str, list[float]]
    backward_s: dict[str, list[float]]
    update_s: dict[str, list[float]]
    state_bytes: list[float]
    kept_bytes: list[float]
    flows: tuple[PieceFlow, ...]
    room_bytes: dict[str, float]
    micro_batches: int

    @classmethod
    def of(cls, judge: Judge, execution: Execution) -> PieceCosts:
        """Look them up."""
        costs, names = judge.costs, judge.names
        rows = max(1, -(-judge.profile.rows // execution.micro_batches))
        seconds = costs.seconds(rows)
        spot_of = {name: spot for spot, name in enumerate(costs.devices)}
        units = [[costs.index_of[u.name] for u in piece.units if u.name in costs.index_of] for piece in judge.pieces]
        piece_of = {unit: piece for piece, members in enumerate(units) for unit in members}
        trained = [sum(unit.trainable_bytes for unit in piece.units) if costs.training else 0 for piece in judge.pieces]
        flows = []
        for flow in costs.flows:
            source, target = piece_of.get(flow.source, -1), piece_of.get(flow.target, -1)
            if source != target:
                flows.append(
                    PieceFlow(source=source, target=target, size_bytes=flow.size_bytes(rows), chained=flow.chained)
                )
        lanes = min(len(names) + 1, execution.micro_batches)
        waiting = lanes if lanes > 1 else 0  # sets of gradients, see `simulate.peak`
        lines = costs.inputs if execution.rematerialize else costs.kept
        kept = [sum((lines[unit](rows) for unit in members), 0.0) for members in units]

        def by_piece(row: tuple[float, ...]) -> list[float]:
            return [sum((row[unit] for unit in members), 0.0) for members in units]

        return cls(
            forward_s={name: by_piece(seconds.forward_s[spot_of[name]]) for name in names},
            backward_s={name: by_piece(seconds.backward_s[spot_of[name]]) for name in names},
            update_s={name: [costs.optimizer_s(spot_of[name], size) for size in trained] for name in names},
            state_bytes=[
                float(piece.need_bytes + waiting * size) for piece, size in zip(judge.pieces, trained, strict=True)
            ],
            kept_bytes=kept if costs.training else [0.0] * len(units),
            flows=tuple(flows),
            room_bytes={name: float(room) for name, room in judge.problem.room_bytes().items()},
            micro_batches=execution.micro_batches,
        )

    def cut_bytes(self, after: int) -> float:
        """What passes the border behind a piece, if the pieces before it and those behind it are on two devices."""
        return sum(flow.size_bytes for flow in self.flows if 0 <= flow.source <= after < flow.target)

    @property
    def mostly_chained(self) -> bool:
        """Whether most of what passes between pieces goes straight from device to device."""
        between = [flow for flow in self.flows if flow.source >= 0 and flow.target >= 0]
        straight = sum(flow.size_bytes for flow in between if flow.chained)
        return 2 * straight >= sum(flow.size_bytes for flow in between)
