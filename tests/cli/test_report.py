"""`lightning-hetero report` and `plan format=html` write a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_hetero.schedule import Span, Timeline

PLAN = ("experiment=digits", "devices=emulated", "placement=even")


@pytest.fixture
def saved(command: Callable[..., Any]) -> None:
    """`plan.json` and its costs, in the current folder."""
    assert command("plan", *PLAN, "save=plan.json", "output=plan.txt").code == 0


@pytest.mark.usefixtures("saved")
def test_a_plan_with_its_costs_has_a_predicted_step(command: Callable[..., Any]) -> None:
    outcome = command("report", "plan.json")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.endswith("wrote plan.html\n")  # matplotlib may say before that it looks for fonts
    text = Path("plan.html").read_text(encoding="utf-8")
    assert "What each device does in a step, predicted" in text
    assert "to 1: " in text  # bytes at the border of the stages


@pytest.mark.usefixtures("saved")
def test_a_plan_alone_and_a_measured_step(command: Callable[..., Any]) -> None:
    Path("plan.costs.json").unlink()
    measured = Timeline((Span(device="emulated:0", op="F", start_s=0, duration_s=0.5),))
    Path("step.json").write_text(measured.to_json(), encoding="utf-8")
    outcome = command("report", "plan.json", "--timeline", "step.json", "--output", "x.html")
    assert outcome.code == 0
    assert outcome.err.endswith("wrote x.html\n")
    assert "What each device does in a step, measured" in Path("x.html").read_text(encoding="utf-8")


def test_a_plan_is_a_page_at_once(command: Callable[..., Any]) -> None:
    outcome = command("plan", *PLAN, "format=html")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.endswith("wrote plan.html\n")  # matplotlib may say before that it looks for fonts
    assert "What each device does in a step, predicted" in Path("plan.html").read_text(encoding="utf-8")


def test_seven_billion_parameters_are_a_page(command: Callable[..., Any]) -> None:
    outcome = command(
        "plan", "model=transformer_7b", "rows=4", "devices=2x24GiB+1x12GiB+cpu", "training=false", "placement=even",
        "format=html", "output=large.html",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "blocks.31" in Path("large.html").read_text(encoding="utf-8")
    assert Path("large.html").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["missing.json"], "the plan file 'missing.json' cannot be read"),
        (["step.json"], "not a plan of this package"),
        (["plan.json", "--timeline", "missing.json"], "--timeline 'missing.json' cannot be read"),
        (["plan.json", "--timeline", "plan.json"], "--timeline 'plan.json': not a timeline of this package"),
        (["plan.json", "--output", "plan.json"], "is the plan itself; choose another name"),
        (["plan.json", "--output", "missing/x.html"], "cannot be written"),
    ],
)
@pytest.mark.usefixtures("saved")
def test_what_cannot_be_read_or_written_is_said(command: Callable[..., Any], words: list[str], complaint: str) -> None:
    Path("step.json").write_text(json.dumps(Timeline().to_dict()), encoding="utf-8")
    outcome = command("report", *words)
    assert outcome.code == 1
    assert "lightning-hetero report: " in outcome.err
    assert complaint in outcome.err
    assert json.loads(Path("plan.json").read_text(encoding="utf-8"))["policy"] == "even"
