"""A problem as a graph of pieces, for the solvers that take any shape."""

from __future__ import annotations

from lightning_hetero.placement.judge import Homes, Judge
from lightning_hetero.placement.piece_costs import PieceCosts
from lightning_hetero.placement.solve import GraphDevice, GraphPlan, GraphProblem
from lightning_hetero.plan.forecast import FORWARD, WHOLE, Execution


def as_graph(judge: Judge, execution: Execution, *, forward_only: bool = False, own_code: bool = True) -> GraphProblem:
    """The graph that comes nearest to the model. Its seconds are those of a batch, in all of its micro-batches.

    The graph's host is the root: what one piece hands to another passes through it, as in the runtime, unless both
    stand in an `nn.Sequential`; then one transfer is counted twice. What own code gives to pieces, and what it takes,
    are nodes of their own that stand on the root. Flows against the order of calls, as in recurrent models, are left
    out.

    Args:
        judge: Knows the problem.
        execution: How a batch runs.
        forward_only: Whether to leave out the backward, as for the latency of a pass.
        own_code: Whether to have nodes for own code. All paths begin and end there, so with them the root's part of a
            contiguous placement would be the whole graph.
    """
    costs, pieces = PieceCosts.of(judge, execution), len(judge.pieces)
    root, times = judge.problem.inventory.root.name, execution.micro_batches
    names = dict.fromkeys((*judge.names, root))
    given = [flow for flow in costs.flows if flow.source < 0 and own_code]
    taken = [flow for flow in costs.flows if flow.target < 0 <= flow.source and own_code]
    edges = [(flow.source, flow.target) for flow in costs.flows if 0 <= flow.source < flow.target]
    edges += [(pieces + at, flow.target) for at, flow in enumerate(given) if flow.target >= 0]
    edges += [(flow.source, pieces + len(given) + at) for at, flow in enumerate(taken)]
    own = [0.0] * (len(given) + len(taken))
    size = [0.0] * pieces
    for flow in costs.flows:
        if flow.source >= 0:  # one tensor that many pieces take leaves its device once
            size[flow.source] = max(size[flow.source], flow.size_bytes)
    size += [flow.size_bytes for flow in given] + [0.0] * len(taken)
    both = 1.0 if forward_only or not judge.problem.training else 2.0  # gradients go the other way
    alive = times if execution.schedule in (WHOLE, FORWARD, "gpipe") else min(times, len(judge.names) + 1)
    seconds, transfer_s, devices = {}, {}, []
    for name in names:
        runs = name in costs.forward_s
        seconds[name] = [
            times * (costs.forward_s[name][spot] + (0.0 if forward_only else costs.backward_s[name][spot]))
            + (0.0 if forward_only else costs.update_s[name][spot])
            if runs
            else float("inf")
            for spot in range(pieces)
        ] + own
        if name != root:
            path = judge.costs.paths[judge.costs.devices.index(name)][judge.costs.root]
            one_s = [path.latency_s + size_bytes * path.s_per_byte if size_bytes else 0.0 for size_bytes in size]
            transfer_s[name] = [both * times * seconds_ for seconds_ in one_s]
        spots = [spot for spot, piece in enumerate(judge.pieces) if name in piece.devices]
        devices.append(
            GraphDevice(
                name=name,
                kind=name,
                memory_bytes=max(0.0, costs.room_bytes.get(name, 0.0)),
                allowed=frozenset([*spots, *range(pieces, len(size))]),
            )
        )
    return GraphProblem(
        seconds=seconds,
        transfer_s=transfer_s,
        size_bytes=[state + alive * kept for state, kept in zip(costs.state_bytes, costs.kept_bytes, strict=True)]
        + own,
        edges=list(dict.fromkeys(edges)),
        devices=tuple(devices),
        pins=dict.fromkeys(range(pieces, len(size)), root),
    )


def homes_of(judge: Judge, plan: GraphPlan) -> Homes:
    """The device of every piece."""
    return tuple(plan[: len(judge.pieces)])
