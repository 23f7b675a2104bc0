"""`lightning-hetero compare` takes real steps with each policy, and shows them beside what was predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_hetero._conf import conf_dir
from lightning_hetero.placement import policy, policy_names

pytestmark = [
    pytest.mark.usefixtures("devices_measured_once"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval.*"),
]
DIGITS = ("experiment=digits", "devices=emulated", "steps=5")
# Parameters, gradients and optimizer state of the model are 976 KiB; an even split needs 534 KiB of one device.
TIGHT = r"devices.memory={emulated\:0: 600KiB, emulated\:1: 600KiB, emulated\:2: 600KiB}"

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def cells(out: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows if row[0]}


def test_policies_stand_side_by_side_with_what_was_predicted_and_measured(command: Command, tmp_path: Path) -> None:
    outcome = command("compare", *DIGITS, "policies=[single,even]")
    assert outcome.code == 0
    assert outcome.out.startswith("Policies side by side")
    rows = cells(outcome.out)
    assert [*rows] == ["single", "even"]
    for status, predicted, measured, ratio, samples, memory, plan in rows.values():
        assert status == "ok"
        assert predicted.endswith("ms")
        assert measured.endswith("s")
        assert float(ratio) > 0
        assert float(samples) > 0
        assert memory.startswith("emulated:0 ~")
        assert len(plan) == 12
    assert rows["single"][-1] != rows["even"][-1]
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []  # nothing is left


def test_json_has_the_numbers_and_a_policy_that_does_not_fit_is_a_row(command: Command) -> None:
    words = ("policies=[single,even]", "placement.profile=never", "format=json", "output=compared.json")
    outcome = command("compare", *DIGITS, TIGHT, *words)
    assert (outcome.code, outcome.out) == (0, "")
    single, even = json.loads(Path("compared.json").read_text())
    assert (single["placement"], single["status"], single["measured_step_s"]) == ("single", "infeasible", None)
    assert "600 KiB" in single["reason"]
    assert (even["placement"], even["status"], even["reason"]) == ("even", "ok", "")
    assert even["measured_step_s"] > 0
    assert even["predicted_step_s"] > 0
    assert even["estimated"] == 1


def test_plain_lightning_is_measured_too(command: Command) -> None:
    row = cells(command("compare", *DIGITS, "trainer.strategy=auto", "policies=single").out)["single"]
    assert (row[0], row[1], row[-1]) == ("ok", "", "")
    assert row[2].endswith("s")


def test_without_any_numbers_the_command_has_failed(command: Command) -> None:
    outcome = command("compare", *DIGITS, TIGHT, "policies=[single]")
    assert outcome.code == 1
    assert cells(outcome.out)["single"][0] == "infeasible"
    assert "lightning-hetero compare: none of the policies could be measured; the first one: " in outcome.err


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("policies=[single,evn]", "'evn'"),
        ("policies=[]", "policies=[] must be a list of names, such as 'policies=[single,even,auto]'"),
        ("policies=3", "policies=3 must be a list of names"),
        ("steps=4", "steps=4 must be a whole number from 5 to 50"),
        ("steps=many", "steps='many' must be a whole number from 5 to 50"),
        ("format=html", "format='html'"),
        ("stepz=4", "Did you mean 'steps'?"),
        ("policies=single,even", "To use it as a list, use key=[value1,value2]"),
    ],
)
def test_a_mistake_is_answered_before_anything_runs(word: str, part: str, command: Command) -> None:
    outcome = command("compare", *DIGITS, word)
    assert (outcome.code, outcome.out) == (1, "")
    assert part in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_all_policies_by_name_are_compared(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {path.stem for path in (conf_dir() / "placement").glob("*.yaml")}  # other tests may have registered more
    monkeypatch.setattr(policy, "_POLICIES", {name: policy._POLICIES[name] for name in ours})
    outcome = command("compare", *DIGITS)
    assert outcome.code == 0
    rows = cells(outcome.out)
    assert [*rows] == [name for name in policy_names() if name not in ("manual", "measured")]
    assert {row[0] for row in rows.values()} == {"ok"}
