"""The partition of a model as a drawing: one column for each device, one row for each stage, arrows between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from lightning_hetero.plan import Plan, Stage
from lightning_hetero.plan.explain import unit_range
from lightning_hetero.report.borders import OWN_CODE, Border
from lightning_hetero.report.theme import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, YELLOW
from lightning_hetero.units import format_bytes

_WIDTH, _BOX_WIDTH, _BOX_HEIGHT, _ROW, _TOP = 230, 200, 40, 78, 34
_LETTERS = 31  # that fit into a box, at its size of text
_MOST_TARGETS = 2  # named under a stage; the others are counted
_UNDER_WORDS = 21  # where arrows begin, below a box and its line of sizes
_ARROWHEAD = (
    '<defs><marker id="arrowhead" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 1 L8 4 L0 7 Z" class="head"/></marker></defs>'
)
_COLOURS = (SKY, ORANGE, GREEN, YELLOW, PURPLE, VERMILLION, BLUE)


def partition_svg(plan: Plan, borders: Sequence[Border] = ()) -> str:
    """Draw stages on their devices as an element for a page of HTML; a replicated stage has a box on each of them.

    Args:
        plan: What is drawn.
        borders: Of the plan. Without any, arrows lead from each stage to the next, and no sizes are written.
    """
    names = [device.name for device in plan.used]
    column = {name: index for index, name in enumerate(names)}
    height = _TOP + _ROW * len(plan.stages) + 6
    parts = [
        f'<svg viewBox="0 0 {max(1, len(names)) * _WIDTH} {height}" '
        f'width="{max(1, len(names)) * _WIDTH}" height="{height}" class="partition" role="img" '
        'aria-label="Stages of the model on their devices">',
        _ARROWHEAD,
    ]
    for index, name in enumerate(names):
        x = index * _WIDTH + _WIDTH // 2
        parts.append(f'<text x="{x}" y="20" text-anchor="middle" class="device">{_fitting(name)}</text>')
        parts.append(f'<line x1="{x}" y1="{_TOP - 6}" x2="{x}" y2="{height}" class="lane"/>')
    for source, target in _arrows(plan, borders):
        parts.append(_arrow(plan, column, source, target, bool(borders)))
    for index, stage in enumerate(plan.stages):
        parts += _boxes(index, stage, column)
        words = _leaving(plan, index, borders)
        if words:
            x, y = _place(column[stage.device], index)
            parts.append(
                f'<text x="{x}" y="{y + _BOX_HEIGHT + 16}" text-anchor="middle" class="size">{escape(words)}</text>'
            )
    return "\n".join([*parts, "</svg>"])


def _boxes(index: int, stage: Stage, column: dict[str, int]) -> Iterator[str]:
    shares = {share.device: share.share for share in stage.shares} or {stage.device: 1.0}
    whole = sum(shares.values())
    for name, share in shares.items():
        x, y = _place(column[name], index)
        part = f", {100 * share / whole:.0f} % of rows" if len(shares) > 1 else ""
        yield (
            f"<g><title>{escape(', '.join(stage.units))}</title>"
            f'<rect x="{x - _BOX_WIDTH // 2}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="4" '
            f'fill="{_COLOURS[column[name] % len(_COLOURS)]}"/>'
            f'<text x="{x}" y="{y + 16}" text-anchor="middle" class="in">'
            f"{_fitting(f'{index}: {unit_range(stage.units)}')}</text>"
            f'<text x="{x}" y="{y + 32}" text-anchor="middle" class="in">'
            f"{escape(format_bytes(stage.need_on(name).total_bytes) + part)}</text></g>"
        )


def _arrows(plan: Plan, borders: Sequence[Border]) -> list[tuple[int, int]]:
    if borders:
        return [(b.source, b.target) for b in borders if OWN_CODE not in (b.source, b.target)]
    return [(index, index + 1) for index in range(len(plan.stages) - 1)]


def _arrow(plan: Plan, column: dict[str, int], source: int, target: int, has_words: bool) -> str:
    (x1, y1), (x2, y2) = (_place(column[plan.stages[index].device], index) for index in (source, target))
    y1 += _BOX_HEIGHT + (_UNDER_WORDS if has_words else 0)
    kind = "flow" if plan.stages[source].device != plan.stages[target].device else "flow stays"
    bend = (y2 - y1) // 2
    curve = f"M{x1} {y1} C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2}"
    if abs(target - source) > 1:  # beside the boxes that are between
        aside = max(x1, x2) + _BOX_WIDTH // 2 + 12
        kind += " skip"
        curve = f"M{x1} {y1} C{aside} {y1 + 20} {aside} {y2 - 20} {x2} {y2}"
    return f'<path d="{curve}" class="{kind}" marker-end="url(#arrowhead)"/>'


def _leaving(plan: Plan, index: int, borders: Sequence[Border]) -> str:
    """What a stage sends to other devices, the largest first."""
    here = plan.stages[index].device
    found = [
        (border.size_bytes, "own code" if border.target == OWN_CODE else str(border.target))
        for border in borders
        if border.source == index
        and (plan.root.name if border.target == OWN_CODE else plan.stages[border.target].device) != here
    ]
    found.sort(reverse=True)
    words = [f"to {target}: {format_bytes(size)}" for size, target in found[:_MOST_TARGETS]]
    return ", ".join(words) + (f", {len(found) - _MOST_TARGETS} more" if len(found) > _MOST_TARGETS else "")


def _place(column: int, row: int) -> tuple[int, int]:
    """The middle of the upper edge of a box."""
    return column * _WIDTH + _WIDTH // 2, _TOP + row * _ROW


def _fitting(text: str) -> str:
    """The text without its middle if it is too long for a box, escaped."""
    half = (_LETTERS - 1) // 2
    return escape(text if len(text) <= _LETTERS else f"{text[:half]}…{text[-half:]}")
