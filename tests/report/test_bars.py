"""Bars of memory and of work, and the chart of a sweep."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightning_hetero.devices import DeviceSpec, Inventory
from lightning_hetero.errors import InventoryError, UsageError
from lightning_hetero.plan import DeviceForecast, Forecast, MemoryNeed, Plan, Stage
from lightning_hetero.report import write_table_chart
from lightning_hetero.report.figures import memory_bars, sweep_chart, utilisation
from lightning_hetero.report.memory import device_memory
from lightning_hetero.schedule import Span, Timeline

Words = Callable[[Figure], list[str]]
Overlaps = Callable[[Figure], list[tuple[str, str]]]
NEED = MemoryNeed(parameters_bytes=100, gradients_bytes=100, optimizer_bytes=200, buffers_bytes=10)


def plan_of(names: Sequence[str], peak_bytes: int | None = None, capacity_bytes: int = 1000) -> Plan:
    """A plan that puts the same on every device but the last, which stays idle."""
    devices = tuple(
        DeviceSpec(name=name, kind="cuda", memory_bytes=capacity_bytes, torch_device="cuda")
        for name in (*names, "idle")
    )
    stages = tuple(Stage(device=name, units=(f"unit{n}",), parameters=25, need=NEED) for n, name in enumerate(names))
    forecast = None
    if peak_bytes is not None:
        forecasts = (
            DeviceForecast(device=name, busy_s=0.5, transfer_s=0, memory_bytes=peak_bytes, limit_bytes=capacity_bytes)
            for name in names
        )
        forecast = Forecast(step_s=1.0, devices=tuple(forecasts), bottleneck="compute of a", estimated=True)
    return Plan(policy="even", devices=devices, stages=stages, forecast=forecast)


def widths(figure: Figure) -> list[float]:
    """Of all bars, in percent, in the order in which they were drawn."""
    return [bar.get_width() for bar in figure.axes[0].patches if isinstance(bar, Rectangle)]


def test_a_bar_has_what_stays_and_what_the_forecast_adds() -> None:
    assert device_memory(plan_of(["a"], 500), "a") == {
        "parameters": 100,
        "gradients": 100,
        "optimizer": 200,
        "buffers": 10,
        "activations": 90,
    }
    assert device_memory(plan_of(["a"], 500), "idle") == {}
    assert widths(memory_bars(plan_of(["a"], 500))) == pytest.approx([100, 10, 10, 20, 1, 9, 100])


def test_without_a_forecast_the_picture_says_that_activations_are_unknown(words_of: Words) -> None:
    found = words_of(memory_bars(plan_of(["a"])))
    assert any("activations are not known" in text for text in found)
    assert "activations, predicted" not in found
    assert "410 B of 1000 B" in found


def test_what_does_not_fit_reaches_beyond_the_line(words_of: Words) -> None:
    figure = memory_bars(plan_of(["a"], 1500))
    assert "1.46 KiB of 1000 B!" in words_of(figure)
    assert figure.axes[0].get_xlim()[1] > 150
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[100, 100]]


def test_an_inventory_gives_other_capacities(words_of: Words) -> None:
    plan = plan_of(["a"])
    assert "410 B of 500 B" in words_of(memory_bars(plan, plan.inventory.with_memory({"a": 500})))
    with pytest.raises(InventoryError, match="unknown device 'a'"):
        memory_bars(plan, Inventory(devices=plan.devices[1:]))


@pytest.mark.parametrize("names", [["a"], ["cuda:0", "x" * 90], [f"cuda:{n}" for n in range(12)]])
def test_no_text_lies_on_another_or_leaves_the_picture(
    names: Sequence[str], step_of: Callable[..., Timeline], overlaps_of: Overlaps
) -> None:
    assert overlaps_of(memory_bars(plan_of(names, 1500), theme="dark")) == []
    assert overlaps_of(utilisation(step_of(names, 4, "zero_bubble"))) == []


def test_work_is_shown_by_sort_and_transfers_do_not_count(words_of: Words) -> None:
    spans = (
        Span(device="a", op="F", start_s=0, duration_s=1),
        Span(device="a", op="transfer", start_s=0, duration_s=4),
        Span(device="a", op="B", start_s=1, duration_s=2),
    )
    figure = utilisation(Timeline(spans))
    assert widths(figure) == pytest.approx([100, 25, 50])
    assert {"a", "75 %", "forward", "backward"} <= {*words_of(figure)}
    assert "transfer" not in words_of(figure)


def test_an_empty_step_has_empty_bars() -> None:
    assert widths(utilisation(Timeline((), ("a",)))) == [100]


ROWS: list[dict[str, Any]] = [
    {
        "overrides": "placement=single",
        "status": "ok",
        "measured_step_s": "0.012",
        "predicted_step_s": 0.011,
        "metric": 0.91,
    },
    {
        "overrides": "placement=even",
        "status": "ok",
        "measured_step_s": "",
        "predicted_step_s": "0.02",
        "metric": "0.912",
    },
    {"overrides": "placement=auto " + "x=1 " * 30, "status": "failed", "reason": "no $room$ for it " * 20 + "\nmore"},
]


def test_points_have_times_metrics_or_reasons(words_of: Words, overlaps_of: Overlaps) -> None:
    figure = sweep_chart(ROWS)
    found = words_of(figure)
    assert widths(figure) == pytest.approx([12, 11, 20])
    assert {"placement=single", "12.0 ms", "20.0 ms", "0.91", "0.912", "measured step", "predicted step"} <= {*found}
    assert any(text.startswith("failed: no $room$ for it") and text.endswith("…") for text in found)
    assert overlaps_of(figure) == []
    assert overlaps_of(sweep_chart(ROWS, theme="dark")) == []


def test_rows_as_a_file_has_them_are_drawn(tmp_path: Path) -> None:
    with (tmp_path / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["overrides", "status", "measured_step_s", "predicted_step_s", "metric", "reason"]
        )
        writer.writeheader()
        writer.writerows(ROWS)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    direct, read = (write_table_chart(each, tmp_path / f"{name}.png") for name, each in (("a", ROWS), ("b", rows)))
    assert direct.read_bytes() == read.read_bytes()


@pytest.mark.parametrize("value", ["nan", "inf", "many", None, ""])
def test_numbers_that_cannot_be_drawn_are_left_out(value: object, words_of: Words) -> None:
    figure = sweep_chart([{"overrides": "a=1", "measured_step_s": value, "metric": value}])
    assert len(figure.axes) == 1  # no metric, no panel for it
    assert widths(figure) == []
    assert "a=1" in words_of(figure)


def test_no_points_are_an_empty_chart() -> None:
    assert widths(sweep_chart([])) == []


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"end it with \.png or \.svg"):
        write_table_chart(ROWS, tmp_path / "sweep.csv")
