"""Steps to draw, and what can be read in a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_hetero.schedule import Span, Timeline, get_schedule
from lightning_hetero.simulate import StageCost, simulate


def _texts(figure: Figure) -> list[Text]:
    """Every text that is seen: an axis has labels for ticks beyond its ends too."""
    figure.draw_without_rendering()
    beyond: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            assert isinstance(axis, Axis)
            low, high = sorted(axis.get_view_interval())
            outside = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
            beyond |= {label for tick in outside for label in (tick.label1, tick.label2)}
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return [text for text in found if text.get_text() and text.get_visible() and text not in beyond]


@pytest.fixture
def words_of() -> Callable[[Figure], list[str]]:
    """Every text of a figure."""
    return lambda figure: [text.get_text() for text in _texts(figure)]


@pytest.fixture
def colours_of() -> Callable[[Figure], set[str]]:
    """The colours of the texts of a figure."""
    return lambda figure: {to_hex(text.get_color()).upper() for text in _texts(figure)}


@pytest.fixture
def overlaps_of() -> Callable[[Figure], list[tuple[str, str]]]:
    """Pairs of texts that lie on each other; of texts that leave the figure the other one is "the rim"."""

    def found(figure: Figure) -> list[tuple[str, str]]:
        boxes = [(text.get_text(), text.get_window_extent().padded(-0.5)) for text in _texts(figure)]
        pairs = [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[:i] if x.overlaps(y)]
        rim = figure.bbox
        return pairs + [(a, "the rim") for a, x in boxes if not (rim.contains(*x.p0) and rim.contains(*x.p1))]

    return found


@pytest.fixture
def step_of() -> Callable[..., Timeline]:
    """`step_of(devices, micro_batches)`: a step as the simulator predicts it, with an optimizer's step at its end."""

    def made(
        devices: Sequence[str], micro_batches: int, schedule: str = "1f1b", per_device: int = 1, seconds: float = 1e-3
    ) -> Timeline:
        stages = [
            StageCost(
                device=devices[index % len(devices)],
                forward_s=seconds * (1 + index % 3),
                backward_s=2 * seconds * (1 + index % 3),
                send_forward_s=seconds / 5,
                send_backward_s=seconds / 5,
            )
            for index in range(len(devices) * per_device)
        ]
        timeline = simulate(stages, get_schedule(schedule), micro_batches)
        optimizer = Span(device=devices[0], op="optimizer", start_s=timeline.end_s, duration_s=seconds)
        return Timeline((*timeline.spans, optimizer), tuple(devices))

    return made
