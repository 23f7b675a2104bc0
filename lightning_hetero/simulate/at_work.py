"""What autograd keeps on each device in training, and the most that is needed on top of it at any moment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

from lightning_hetero.profile.costs import Line
from lightning_hetero.simulate.costs import Costs, Entering, Flow
from lightning_hetero.simulate.rerun import Piece, handed_on, piece_of_units
from lightning_hetero.simulate.route import Route


class Work:
    """Bytes of the largest micro-batches together.

    Args:
        rows: Rows of every micro-batch, the largest first.

    Attributes:
        is_cut: Whether there are several.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = (0, *accumulate(rows))
        self.is_cut = len(rows) > 1

    def bytes_of(self, line: Line, in_flight: int) -> float:
        """Bytes of something that so many of them have."""
        return line.fixed * in_flight + line.per_row * self._rows[in_flight]


def at_work(
    costs: Costs,
    route: Route,
    device_of: Mapping[str, str],
    work: Work,
    held: Sequence[int],
    own_bytes: float,
    pieces: Sequence[Piece] = (),
) -> dict[int, float]:
    """The most that autograd keeps and the unit at work needs, by index of the device, in training.

    The micro-batch at work has let go of what it kept of later units, or has not come to them yet; the others keep all.
    Of pieces that run again, their inputs are kept; all that is inside of one of them is there while it runs again.

    Args:
        costs: Of the model.
        route: Its stages.
        device_of: Device name of each unit.
        work: The micro-batches.
        held: How many of them each stage keeps something of.
        own_bytes: What own code needs on the root when everything is kept.
        pieces: What runs again in the backward.
    """
    where = [run.device for run in route.runs for _ in range(run.first, run.stop)]
    is_block = [len({device_of[name] for name in names}) == 1 for names in costs.around]
    piece_of = piece_of_units(costs, pieces)
    kept, leaving, passing, entering = _kept(costs, where, is_block, work.is_cut, piece_of)
    code = _code(costs, where, is_block, piece_of)
    handed = handed_on(costs, piece_of)
    waits = _waits(costs, where, is_block)
    others: defaultdict[int, float] = defaultdict(float)
    before: defaultdict[int, float] = defaultdict(float)
    most: defaultdict[int, float] = defaultdict(float)

    def keep(device: int, line: Line, in_flight: int) -> None:
        own = work.bytes_of(line, 1)
        others[device] += work.bytes_of(line, in_flight) - own
        before[device] += own

    def run_code(after: int, in_flight: int, inside: bool) -> None:
        for device, line, moment_line, is_inside in code.get(after, ()):
            if is_inside is inside:
                keep(device, line, 1 if inside else in_flight)
                there = stays if device == run.device else 0.0
                most[device] = max(most[device], before[device] + there + work.bytes_of(moment_line, 1))

    for device, line, _, _ in code.get(-1, ()):
        keep(device, line, held[0] if held else 1)
    for run, in_flight in zip(route.runs, held, strict=True):
        # What leaves a stage is held until the backward of the stage has ended.
        stays = sum(work.bytes_of(leaving[unit], 1) for unit in range(run.first, run.stop))
        moved = Line()  # inputs that are not kept, but are there until the forward of the stage has ended
        begin, inputs = 0.0, Line()  # of the piece at work: what was kept before it, and what it keeps
        for unit in range(run.first, run.stop):
            piece = piece_of[unit]
            if piece >= 0 and unit == pieces[piece][0]:
                begin, inputs = before[run.device], Line()
            inputs += entering[unit]
            keep(run.device, kept[unit], in_flight if piece < 0 else 1)
            stays -= work.bytes_of(leaving[unit], 1)
            cost, moved = costs.units[unit], moved + passing[unit][1]
            moments = dict.fromkeys((run.device, *waits[unit]), 0.0)
            forward = cost.temporary_bytes + passing[unit][0] + moved + handed.get(piece, Line())
            moments[run.device] = stays + max(work.bytes_of(line, 1) for line in (forward, cost.backward_bytes))
            for device, moment in moments.items():
                wait = work.bytes_of(waits[unit].get(device, Line()), 1)
                most[device] = max(most[device], before[device] + moment + wait)
            run_code(unit, in_flight, inside=True)
            if piece >= 0 and unit == pieces[piece][1] - 1:
                before[run.device] = begin
                keep(run.device, inputs, in_flight)
            run_code(unit, in_flight, inside=False)
    # Own code has its moment on the root when everything is kept.
    most[costs.root] = max(most[costs.root], before[costs.root] + own_bytes)
    return {device: others[device] + most[device] for device in most}


def kept_by_units(
    costs: Costs, route: Route, device_of: Mapping[str, str], is_cut: bool, pieces: Sequence[Piece] = ()
) -> list[Line]:
    """What is kept of each unit that is called for one micro-batch, inputs included, every tensor once on its device.

    What own code on the same device keeps belongs to the unit that was called before.

    Args:
        costs: Of the model.
        route: Its stages.
        device_of: Device name of each unit.
        is_cut: Whether there are several micro-batches.
        pieces: What runs again in the backward, and keeps its inputs only.
    """
    where = [run.device for run in route.runs for _ in range(run.first, run.stop)]
    is_block = [len({device_of[name] for name in names}) == 1 for names in costs.around]
    piece_of = piece_of_units(costs, pieces)
    kept, _, _, entering = _kept(costs, where, is_block, is_cut, piece_of)
    found = [kept[unit] if piece < 0 else entering[unit] for unit, piece in enumerate(piece_of)]
    for after, parts in _code(costs, where, is_block, piece_of).items():
        for device, line, _, runs_again in parts:
            if after >= 0 and device == where[after] and not runs_again:
                found[after] += line
    return found


def _code(
    costs: Costs, where: list[int], is_block: list[bool], piece_of: list[int]
) -> dict[int, list[tuple[int, Line, Line, bool]]]:
    """Device, what it keeps, its moment, and whether it runs again, of own code after each unit.

    What units keep anyway is theirs.
    """
    found: defaultdict[int, list[tuple[int, Line, Line, bool]]] = defaultdict(list)
    for around, after, kept, moment_bytes in costs.code:
        device = _device(costs, around, where, is_block, after)
        piece = _piece_around(costs, around, after, piece_of)
        size = Line()
        moment = moment_bytes
        for line, source, takers in kept:
            made = (
                source >= 0
                and where[source] == device
                and piece_of[source] in (-1, piece)
                and _keeps(costs.units[source].saved_output_bytes, line)
            )
            if made:
                continue
            if any(where[unit] == device and _takes(costs, unit) for unit in takers):
                moment += line  # the unit has let go of it by then, and this code has not
            else:
                size += line
        found[after].append((device, size, moment, piece >= 0))
    return found


def _piece_around(costs: Costs, around: int, after: int, piece_of: list[int]) -> int:
    """The piece of which own code is a part; -1 for none."""
    if around < 0 or after < 0 or piece_of[after] < 0:
        return -1
    pieces = {piece_of[unit] for unit, cost in enumerate(costs.units) if cost.name in costs.around[around]}
    return piece_of[after] if pieces == {piece_of[after]} else -1


def _waits(costs: Costs, where: list[int], is_block: list[bool]) -> list[dict[int, Line]]:
    """Gradients that wait while the backward of each unit runs, by device."""
    found: list[dict[int, Line]] = [{} for _ in costs.units]
    for around, source, first, last, size_bytes in costs.waiting:
        # It waits where own code is, and it may have gone on to the unit that made the tensor.
        devices = {_device(costs, around, where, is_block, last), *(where[source : source + 1] if source >= 0 else ())}
        for unit in range(first, last + 1):
            for device in devices:
                found[unit][device] = found[unit].get(device, Line()) + size_bytes
    return found


def _device(costs: Costs, around: int, where: list[int], is_block: list[bool], unit: int) -> int:
    """Where own code runs: with the units of its module, or on the root."""
    if around < 0 or not is_block[around]:
        return costs.root
    names = costs.around[around]
    return next((where[i] for i in range(len(where)) if costs.units[i].name in names), costs.root)


def _kept(
    costs: Costs, where: list[int], is_block: list[bool], cut: bool, piece_of: list[int]
) -> tuple[list[Line], list[Line], list[tuple[Line, Line]], list[Line]]:
    """What is kept of each unit for one micro-batch, every tensor once on its device.

    Where a batch is cut, inputs and outputs of what runs in one piece are kept in any case. The batch stays.

    Returns:
        What is kept, the part of it that leaves the unit, what it takes without keeping it (from its own device, and
        from others), and the part of what is kept that enters or leaves a piece that runs again.
    """
    kept = [unit.saved_bytes.scaled(unit.calls) for unit in costs.units]
    leaving: list[set[tuple[Line, bool]]] = [set() for _ in costs.units]
    passing = [(Line(), Line())] * len(costs.units)
    entering = [Line()] * len(costs.units)
    chained: set[tuple[int, int]] = set()  # makers and pieces between which nothing goes home
    for flow in costs.flows:
        here = where[flow.source] if flow.source >= 0 else costs.root
        there = where[flow.target] if flow.target >= 0 else costs.root
        inside = flow.chained or (flow.around >= 0 and is_block[flow.around])
        stays = here == there and (here == costs.root or inside)
        if flow.target >= 0:
            piece = piece_of[flow.target]
            if flow.chained:
                chained.add((flow.source, piece))
            enters = piece >= 0 and (flow.source < 0 or piece_of[flow.source] != piece)
            again = stays and flow.taken_before >= 0 and where[flow.taken_before] == there
            again = again and piece_of[flow.taken_before] in (-1, piece)
            saved = stays and flow.source >= 0 and piece_of[flow.source] in (-1, piece) and _saves_output(costs, flow)
            if not again and not saved:
                entering[flow.target] += flow.size_bytes if enters else Line()
                is_batch = here == there and flow.source < 0 and not flow.has_gradient
                share = (
                    1.0 if enters or is_batch or (cut and (here != there or not inside)) else _saved_share(costs, flow)
                )
                kept[flow.target] += flow.size_bytes.scaled(share)
                rest = flow.size_bytes.scaled(1.0 - share)
                found, moved = passing[flow.target]
                passing[flow.target] = (found + rest, moved) if here == there else (found, moved + rest)
        if cut and flow.source >= 0 and (flow.target < 0 or not stays):
            if flow.source in costs.in_chain and not flow.chained and here != costs.root:
                # It goes to the root at the end of the chain, and its gradient comes there.
                leaving[flow.source].add((flow.size_bytes.scaled(2.0), False))
            else:
                saved = piece_of[flow.source] < 0 and _saves_output(costs, flow)
                leaving[flow.source].add((flow.size_bytes, saved))
    given = _given(costs, where, is_block, piece_of, chained)
    known = {piece_of[first] for first in given}
    for unit, piece in enumerate(piece_of):
        if piece in known:  # what it is called with is kept once, and not what its units take
            entering[unit], hidden = given.get(unit, (Line(), Line()))
            kept[unit] += hidden
    for unit, flows in enumerate(leaving):
        entering[unit] = sum((size for size, saved in flows if not saved), entering[unit])
        kept[unit] = sum((size for size, saved in flows if not saved), kept[unit])
    return kept, [sum((size for size, _ in flows), Line()) for flows in leaving], passing, entering


def _given(
    costs: Costs, where: list[int], is_block: list[bool], piece_of: list[int], chained: set[tuple[int, int]]
) -> dict[int, tuple[Line, Line]]:
    """What each piece that is a module is called with and nobody else keeps, by its first unit.

    Flows do not tell: own code may be the only one that looks at such a tensor, and make what units take.

    Returns:
        All of it, and the part of it that no unit of the piece takes.
    """
    units_of: dict[int, list[int]] = {}
    for unit, piece in enumerate(piece_of):
        if piece >= 0:
            units_of.setdefault(piece, []).append(unit)
    found: dict[int, tuple[Line, Line]] = {}
    modules: dict[int, int] = {}  # of each piece, the outermost
    counted: set[tuple[int, int]] = set()
    for entering in costs.entering if units_of else ():
        called = costs.called_in[entering.module] if entering.module >= 0 else ()
        piece = piece_of[called[0]] if called else -1
        if piece < 0 or [*called] != units_of[piece]:
            continue
        first = called[0]
        if modules.setdefault(piece, entering.module) != entering.module:
            continue
        total, hidden = found.setdefault(first, (Line(), Line()))
        stays = _stays(costs, entering, where, is_block, (entering.source, piece) in chained)
        there = where[first]
        if stays and ((there, entering.tensor) in counted or _is_kept(costs, entering, there, where, piece_of)):
            continue
        counted.add((there, entering.tensor))
        size = entering.size_bytes
        found[first] = (total + size, hidden if entering.taken_inside else hidden + size)
    return found


def _stays(costs: Costs, entering: Entering, where: list[int], is_block: list[bool], chained: bool) -> bool:
    """Whether a module gets the very tensor, and no copy."""
    here = where[entering.source] if entering.source >= 0 else costs.root
    there = where[costs.called_in[entering.module][0]]
    inside = chained or (entering.around >= 0 and is_block[entering.around])
    return here == there and (here == costs.root or inside)


def _is_kept(costs: Costs, entering: Entering, there: int, where: list[int], piece_of: list[int]) -> bool:
    """Whether a unit outside of all pieces keeps the tensor in any case, as its output or its input."""
    source, taker = entering.source, entering.taken_before
    if taker >= 0 and where[taker] == there and piece_of[taker] < 0:
        return True
    if source < 0 or piece_of[source] >= 0:
        return False
    unit = costs.units[source]
    return _keeps(unit.saved_output_bytes.scaled(unit.calls), entering.size_bytes)


def _saved_share(costs: Costs, flow: Flow) -> float:
    """The part of a unit's inputs that autograd keeps."""
    unit = costs.units[flow.target]
    if unit.saved_input_bytes is None:
        return 1.0
    rows = costs.profile.rows
    return min(1.0, unit.calls * unit.saved_input_bytes(rows) / max(costs.inputs[flow.target](rows), 1.0))


def _saves_output(costs: Costs, flow: Flow) -> bool:
    """Whether what flows is kept by the unit that made it anyway."""
    unit = costs.units[flow.source]
    return _keeps(unit.saved_output_bytes.scaled(unit.calls), flow.size_bytes)


def _takes(costs: Costs, unit: int) -> bool:
    """Whether a unit keeps its inputs."""
    saved = costs.units[unit].saved_input_bytes
    return saved is None or saved(costs.profile.rows) > 0


def _keeps(saved: Line, size: Line) -> bool:
    """Whether what is kept is as large as something."""
    return saved.fixed >= size.fixed and saved.per_row >= size.per_row and bool(size.fixed or size.per_row)
