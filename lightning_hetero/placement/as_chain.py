"""A problem as a chain of pieces in the order of their calls, for the exact programme."""

from __future__ import annotations

from typing import Literal

from lightning_hetero.placement.judge import Judge
from lightning_hetero.placement.piece_costs import PieceCosts
from lightning_hetero.placement.solve import ChainDevice, ChainLink, ChainPlan, ChainProblem
from lightning_hetero.plan.forecast import FORWARD, WHOLE, Execution


def as_chain(judge: Judge, execution: Execution, turns: int = 1) -> ChainProblem:
    """The chain that comes nearest to the model.

    It is the model itself if all that passes between pieces passes from one to the next, inside of an `nn.Sequential`.
    Else what skips pieces counts at every border that it passes, and if most of it goes through the root, so does all.
    What own code gives to pieces and takes from them is left out, and so are the calls' overheads.

    Args:
        judge: Knows the problem.
        execution: How a batch runs.
        turns: How often each device takes a turn; with more than one, each turn is a device of its own, named
            `device#turn`, with its part of the memory.
    """
    costs = PieceCosts.of(judge, execution)
    root = judge.problem.inventory.root.name
    kinds: dict[tuple[float, ...], str] = {}
    kind_of = {
        name: kinds.setdefault((*costs.forward_s[name], *costs.backward_s[name], *costs.update_s[name]), name)
        for name in judge.names
    }
    turn_names = [f"{name}#{turn}" if turns > 1 else name for turn in range(turns) for name in judge.names]
    devices = tuple(
        ChainDevice(
            name=turn_name,
            kind=kind_of[device_of_turn(turn_name, turns)],
            memory_bytes=max(0.0, costs.room_bytes[device_of_turn(turn_name, turns)]) / turns,
            allowed=_allowed(judge, device_of_turn(turn_name, turns)),
        )
        for turn_name in turn_names
    )
    straight = costs.mostly_chained
    links = {
        (one, other): _link(judge, device_of_turn(one, turns), device_of_turn(other, turns), None if straight else root)
        for one in turn_names
        for other in turn_names
        if device_of_turn(one, turns) != device_of_turn(other, turns)
    }
    used = sorted(set(kind_of.values()))
    return ChainProblem(
        forward_s={kind: costs.forward_s[kind] for kind in used},
        backward_s={kind: costs.backward_s[kind] for kind in used},
        update_s={kind: costs.update_s[kind] for kind in used},
        state_bytes=costs.state_bytes,
        activation_bytes=costs.kept_bytes,
        output_bytes=[costs.cut_bytes(after) for after in range(len(judge.pieces))],
        devices=devices,
        links=links,
        micro_batches=execution.micro_batches,
        schedule=chain_schedule(execution),
    )


def chain_schedule(execution: Execution) -> Literal["1f1b", "gpipe"]:
    """The schedule of chains that keeps as many micro-batches in flight."""
    if execution.rematerialize:
        return "1f1b"
    return "gpipe" if execution.schedule in (WHOLE, FORWARD, "gpipe") else "1f1b"


def device_of_turn(name: str, turns: int) -> str:
    """The device behind the name of a turn."""
    return name.rpartition("#")[0] if turns > 1 else name


def homes_of(plan: ChainPlan, turns: int = 1) -> tuple[str, ...]:
    """The device of every piece."""
    return tuple(device_of_turn(stage.device, turns) for stage in plan for _ in range(stage.first, stage.stop))


def _allowed(judge: Judge, name: str) -> frozenset[int] | None:
    spots = frozenset(spot for spot, piece in enumerate(judge.pieces) if name in piece.devices)
    return None if len(spots) == len(judge.pieces) else spots


def _link(judge: Judge, one: str, other: str, root: str | None) -> ChainLink:
    """The way from device to device, over the root if there is one to pass."""
    spot = judge.costs.devices.index
    steps = [(one, other)] if root is None else [(one, root), (root, other)]
    paths = [judge.costs.paths[spot(a)][spot(b)] for a, b in steps if a != b]
    s_per_byte = sum(path.s_per_byte for path in paths)
    return ChainLink(
        latency_s=sum(path.latency_s for path in paths),
        bytes_per_s=1 / s_per_byte if s_per_byte > 0 else float("inf"),
    )
