"""The page about a plan: whole, safe, self-contained, and small enough."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_hetero.devices import DeviceSpec, Inventory
from lightning_hetero.errors import TargetError, UsageError
from lightning_hetero.plan import Alternative, DeviceForecast, Execution, Forecast, MemoryNeed, Plan, Share, Stage
from lightning_hetero.report import Border, html, write_html
from lightning_hetero.report.partition import partition_svg
from lightning_hetero.schedule import Span, Timeline

VOID = {"meta", "link", "img", "source", "br", "hr", "input"}
EVIL = "<script>alert('x')</script>\"&--><b>"


class Outline(HTMLParser):
    """What a page consists of; a tag that is closed wrongly is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.references += [value for name, value in attrs if name in {"src", "srcset", "href"} and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def plan_of(name: str = "cuda:0", unit: str = "encoder.0", stages: int = 2, units: int = 1) -> Plan:
    """Stages on three devices by turns; the second one is replicated."""
    names = (name, "cuda:1", "cpu")
    devices = tuple(DeviceSpec(name=n, kind="cuda", memory_bytes=2**30, torch_device="cuda", label=name) for n in names)
    need = MemoryNeed(parameters_bytes=2**20, gradients_bytes=2**20)
    made = []
    for index in range(stages):
        shares = (Share(device="cuda:1", share=2.0), Share(device="cpu", share=1.0)) if index == 1 else ()
        inside = tuple(f"{unit}.{index}.{k}" for k in range(units))
        made.append(Stage(device=names[index % 3], units=inside, parameters=5, need=need, shares=shares))
    forecasts = tuple(
        DeviceForecast(device=n, busy_s=0.5, transfer_s=0.1, memory_bytes=2**23, limit_bytes=2**30) for n in names
    )
    return Plan(
        policy="auto",
        devices=devices,
        stages=tuple(made),
        notes=(f"Because of {unit}.",),
        execution=Execution(micro_batches=4, schedule="forward"),
        forecast=Forecast(step_s=0.25, devices=forecasts, bottleneck=f"compute of {name}", estimated=True),
        proof="within 3 % of the best",
        alternatives=(Alternative(policy="single", step_s=None, reason=f"{unit} needs more"),),
        model="abc",
    )


def written(path: Path) -> tuple[str, Outline]:
    text = path.read_text(encoding="utf-8")
    return text, Outline(text)


def test_a_plan_alone_is_a_page(tmp_path: Path) -> None:
    _, outline = written(write_html(tmp_path / "x.html", Plan(policy="even", devices=plan_of().devices, stages=())))
    assert "Plan by policy 'even'" in outline.words
    assert "A step" not in outline.words


def test_everything_that_is_known_is_on_the_page(tmp_path: Path, step_of: Callable[..., Timeline]) -> None:
    plan = plan_of()
    step, slower = (step_of(["cuda:0", "cuda:1", "cpu"], 4, seconds=s) for s in (1e-3, 1.5e-3))
    text, outline = written(
        write_html(
            tmp_path / "x.html",
            plan,
            inventory=Inventory(devices=plan.devices),
            predicted=step,
            measured=slower,
            alternatives=(plan_of("other"),),
            borders=(Border(-1, 0, 100), Border(0, 1, 3 * 2**20), Border(1, -1, 2048)),
        )
    )
    words = " ".join(outline.words)
    for expected in (
        "Because of encoder.0.",
        "within 3 % of the best",
        "encoder.0 needs more",
        "does not fit",
        "250 ms a step, bound by compute of cuda:0; 4 micro-batches, schedule 'forward'",
        "so 50 % more than predicted",
        "to 1: 3.00 MiB",
        "to own code: 2.00 KiB",
        "67 % of rows",
        "Runners-up",
        "Python",
        'HeteroStrategy(plan="plan.json")',
        "model abc",
    ):
        assert expected in words
    assert outline.tags.count("svg") == 5  # partition, the step, the work of each device twice, memory
    assert '"policy": "auto"' in words  # the plan as text, to be saved
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text


def test_nothing_is_fetched_from_anywhere(tmp_path: Path, step_of: Callable[..., Timeline]) -> None:
    path = write_html(tmp_path / "x.html", plan_of(), predicted=step_of(["a", "b"], 4), measured=step_of(["a"], 2))
    text, outline = written(path)
    assert re.findall(r"https?:|//\w+\.|@import|url\((?!#)", text) == []
    assert all(reference.startswith(("#", "data:")) for reference in outline.references)
    assert {reference[1:] for reference in outline.references if reference.startswith("#")} <= {*outline.ids}
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= {*outline.ids}
    assert len(set(outline.ids)) == len(outline.ids)


def test_names_cannot_break_out(tmp_path: Path) -> None:
    timeline = Timeline((Span(device=EVIL, op=EVIL, start_s=0, duration_s=1),))
    plan = plan_of(EVIL, EVIL)
    path = write_html(tmp_path / "x.html", plan, predicted=timeline, measured=timeline, alternatives=(plan,))
    text, outline = written(path)
    assert not {"script", "b"} & {*outline.tags}
    assert "<script" not in text
    assert any(EVIL in words for words in outline.words)


def test_many_boxes_become_pixels(tmp_path: Path) -> None:
    spans = [
        Span(device=f"d{n % 12}", op="F", micro_batch=n, start_s=float(n // 12), duration_s=1.0) for n in range(12_000)
    ]
    path = write_html(tmp_path / "x.html", plan_of(), predicted=Timeline(tuple(spans)))
    _, outline = written(path)
    assert [reference[:22] for reference in outline.references if reference[0] != "#"] == ["data:image/png;base64,"] * 2
    assert path.stat().st_size < html.LIMIT_BYTES


def test_forty_stages_of_three_hundred_units_are_a_page(tmp_path: Path) -> None:
    plan = plan_of(stages=40, units=8)
    borders = [Border(n, n + 1, 2**20) for n in range(39)] + [Border(0, n, 2**18) for n in range(2, 40)]
    path = write_html(tmp_path / "x.html", plan, borders=borders)
    _, outline = written(path)
    assert outline.words.count("to 4: 1.00 MiB") == 1
    assert any(words.endswith("24 more") for words in outline.words)
    assert path.stat().st_size < 1_000_000


def test_a_page_that_would_be_too_large_does_without_the_plan_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_html(tmp_path / "x.html", plan_of()).stat().st_size
    monkeypatch.setattr(html, "LIMIT_BYTES", whole - 1)
    assert "The plan as text" not in write_html(tmp_path / "x.html", plan_of()).read_text(encoding="utf-8")
    monkeypatch.setattr(html, "LIMIT_BYTES", 1000)
    with pytest.raises(UsageError, match=r"more than 1,000; draw its parts with lightning_hetero\.report\.figures"):
        write_html(tmp_path / "x.html", plan_of())


def test_equal_plans_are_equal_pages(tmp_path: Path) -> None:
    first, second = (write_html(tmp_path / name, plan_of()).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be written: .*choose another path"):
        write_html(tmp_path / "missing" / "x.html", plan_of())


def test_without_matplotlib_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TargetError, match=r"pip install 'lightning-hetero\[pictures\]'"):
        write_html(tmp_path / "x.html", plan_of())
    assert not (tmp_path / "x.html").exists()


def test_without_borders_arrows_follow_the_order_of_stages() -> None:
    drawn = partition_svg(plan_of(stages=4))
    assert drawn.count('class="flow') == 3
    assert "to 1" not in drawn
