"""Boxes along the time: what is drawn, that nothing overlaps, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lightning_hetero.errors import TargetError, UsageError
from lightning_hetero.report.figures import gantt, gantt_pair, save
from lightning_hetero.report.theme import MEMORY, OPS, THEMES
from lightning_hetero.schedule import Span, Timeline

StepOf = Callable[..., Timeline]
Words = Callable[[Figure], list[str]]
Overlaps = Callable[[Figure], list[tuple[str, str]]]
LONG = "NVIDIA GeForce RTX 4090 in the third slot from below, cuda:0"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("devices", "micro_batches", "schedule", "per_device"),
    [
        (["cpu"], 1, "gpipe", 1),
        (["cuda:0", "cpu"], 4, "1f1b", 1),
        ([LONG, "cpu"], 6, "interleaved_1f1b", 2),
        ([f"cuda:{n}" for n in range(5)], 8, "zero_bubble", 1),
        ([f"cuda:{n}" for n in range(12)], 32, "1f1b", 1),
    ],
)
def test_no_text_lies_on_another_or_leaves_the_picture(
    step_of: StepOf,
    overlaps_of: Overlaps,
    devices: Sequence[str],
    micro_batches: int,
    schedule: str,
    per_device: int,
    theme: str,
) -> None:
    timeline = step_of(devices, micro_batches, schedule, per_device)
    assert overlaps_of(gantt(timeline, theme=theme)) == []
    slower = step_of(devices, micro_batches, schedule, per_device, seconds=1.4e-3)
    assert overlaps_of(gantt_pair(timeline, slower, theme=theme)) == []


def test_boxes_stand_where_the_spans_are() -> None:
    spans = (
        Span(device="a", op="F", stage=0, micro_batch=0, start_s=5.0, duration_s=1.0),
        Span(device="a", op="F", stage=0, micro_batch=1, start_s=7.0, duration_s=2.0),
        Span(device="b", op="B", stage=1, micro_batch=1, start_s=9.0, duration_s=1.0),
    )
    axes = gantt(Timeline(spans)).axes[0]
    idle_a, forward, idle_b, backward = (
        [(box.x0, box.x1) for box in (path.get_extents() for path in drawn.get_paths())] for drawn in axes.collections
    )
    assert idle_a == idle_b == [(0.0, 5.0)]
    assert forward == [(0.0, 1.0), (2.0, 4.0)]
    assert backward == [(4.0, 5.0)]


def test_names_shares_numbers_and_what_colours_mean_are_written(step_of: StepOf, words_of: Words) -> None:
    found = words_of(gantt(step_of(["cuda:0", "cpu"], 3), name="Predicted"))
    assert {"cuda:0", "cpu", "0", "1", "2", "time in ms", "forward", "backward", "optimizer", "transfer", "idle"} <= {
        *found
    }
    assert any(text.startswith("Predicted: ") and "bubble" in text for text in found)


def test_several_stages_on_a_device_are_told_apart(step_of: StepOf, words_of: Words) -> None:
    assert {"0F0", "2B1"} <= {*words_of(gantt(step_of(["a", "b"], 2, "interleaved_1f1b", 2)))}


def test_a_number_without_room_is_left_out(words_of: Words) -> None:
    spans = [
        Span(device="a", op="F", micro_batch=0, start_s=0, duration_s=1.0),
        Span(device="a", op="F", micro_batch=77, start_s=1.0, duration_s=1e-6),
    ]
    found = words_of(gantt(Timeline(tuple(spans))))
    assert "0" in found
    assert "77" not in found


def test_what_took_next_to_no_time_is_still_visible() -> None:
    spans = (
        Span(device="a", op="F", start_s=0, duration_s=1.0),
        Span(device="a", op="B", start_s=1.0, duration_s=1e-9),
    )
    figure = gantt(Timeline(spans))
    box = figure.axes[0].collections[-1].get_paths()[0].get_extents()
    assert box.transformed(figure.axes[0].transData).width >= 0.5  # pixels


def test_predicted_and_measured_have_one_axis_of_time(step_of: StepOf, words_of: Words) -> None:
    figure = gantt_pair(step_of(["a"], 1), step_of(["a", "b"], 1, seconds=2e-3))
    upper, lower = figure.axes
    assert upper.get_xlim() == lower.get_xlim()
    assert upper.get_position().x0 == lower.get_position().x0
    assert words_of(figure).count("b") == 2  # so that rows can be compared


@pytest.mark.parametrize("timeline", [Timeline(), Timeline((), ("cpu",))])
def test_an_empty_step_says_so(timeline: Timeline, words_of: Words) -> None:
    assert "A step: nothing happened" in words_of(gantt(timeline))


@pytest.mark.parametrize("name", ["$a_b$", "日本", "line\nbreak", "\\frac{1}{2}", "<b>", "é", ""])
def test_any_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    spans = (Span(device=name, op=name, start_s=0, duration_s=1),)
    for suffix in ("png", "svg"):
        assert save(gantt(Timeline(spans)), tmp_path / f"x.{suffix}").stat().st_size > 1000


def test_a_dark_picture_has_a_dark_ground_and_light_words(colours_of: Callable[[Figure], set[str]]) -> None:
    figure = gantt(Timeline((), ("cpu",)), theme="dark")
    assert matplotlib.colors.to_hex(figure.get_facecolor()).upper() == THEMES["dark"].background
    assert colours_of(figure) == {THEMES["dark"].foreground}


def test_an_unknown_theme_is_refused() -> None:
    with pytest.raises(UsageError, match="theme='blue' is not known; write 'light' or 'dark'"):
        gantt(Timeline(), theme="blue")


@pytest.mark.parametrize("paints", [OPS, MEMORY])
def test_things_that_share_a_colour_have_another_hatch(paints: dict[str, Any]) -> None:
    assert len({(paint.colour, paint.hatch) for paint in paints.values()}) == len(paints)


@pytest.mark.parametrize("paints", [OPS, MEMORY])
def test_things_that_are_as_bright_as_each_other_have_another_hatch(paints: dict[str, Any]) -> None:
    for first, second in combinations(paints.values(), 2):
        if first.hatch == second.hatch:
            assert abs(luminance(first.colour) - luminance(second.colour)) > 0.1, (first.label, second.label)


def luminance(colour: str) -> float:
    """What is left of a colour in a print without colours, from 0 to 1 (WCAG 2.1)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_equal_steps_are_equal_files(tmp_path: Path, step_of: StepOf, suffix: str) -> None:
    first, second = (
        save(gantt(step_of(["a", "b"], 2)), tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two")
    )
    assert first == second


def test_the_users_settings_neither_matter_nor_change(tmp_path: Path, step_of: StepOf) -> None:
    usual = save(gantt(step_of(["a"], 2)), tmp_path / "usual.png").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "savefig.dpi": 7}):
        before = dict(matplotlib.rcParams)
        assert save(gantt(step_of(["a"], 2)), tmp_path / "other.png").read_bytes() == usual
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_touched(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = """
import sys
from lightning_hetero.report.figures import gantt, save
from lightning_hetero.schedule import Timeline
assert "matplotlib" not in sys.modules, "imported before anybody draws"
save(gantt(Timeline((), ("cpu",))), "x.png")
print("matplotlib.pyplot" in sys.modules)
"""
    assert run_python("-c", code).stdout.strip().splitlines()[-1] == "False"


def test_other_endings_and_folders_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    figure = gantt(Timeline())
    with pytest.raises(UsageError, match=r"'x\.gif' is no picture that can be written; end it with \.png or \.svg"):
        save(figure, "x.gif")
    with pytest.raises(UsageError, match=r"cannot be written: .*choose another path"):
        save(figure, tmp_path / "missing" / "x.png")


def test_without_matplotlib_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TargetError, match=r"pip install 'lightning-hetero\[pictures\]'"):
        gantt(Timeline((), ("cpu",)))
