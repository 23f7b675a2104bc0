"""`lightning-hetero plan` and `simulate`: what would run where, before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_hetero.plan import Plan
from lightning_hetero.schedule import Timeline

Command = Callable[..., Any]
SMALL = ("model=transformer_7b", "model.depth=4", "model.dim=64", "model.heads=4", "model.hidden=128", "rows=4")
QUIET = ("+trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false", "+trainer.limit_train_batches=2")


@pytest.fixture
def saved(command: Command, tmp_path: Path) -> Path:
    """A plan for the digits over three emulated devices, with its costs beside it."""
    path = tmp_path / "plan.json"
    words = ("experiment=digits", "devices=emulated", "placement=even", "schedule=forward", f"save={path}")
    assert command("plan", *words).code == 0
    return path


def test_a_plan_says_which_device_has_what_and_why(command: Command) -> None:
    shown = command("plan", "experiment=digits", "devices=emulated", "placement=even")

    assert shown.code == 0, shown.err
    assert re.search(r"0\s+│ emulated:0 │ features.0 … features.3", shown.out)
    assert "Units are shared out evenly over 3 of 3 devices" in shown.out
    assert "Seconds are estimates for 64 rows" in shown.out
    assert shown.folders == []  # nothing is left but what was asked for


@pytest.mark.slow  # a second or two on a quiet machine, and searches that take as long as they may
def test_seven_billion_parameters_that_fit_nowhere_are_answered_with_what_would_fit(command: Command) -> None:
    refused = command("plan", "model=transformer_7b", "rows=4", "devices=2x24GiB+1x12GiB+cpu-20GiB")

    assert refused.code == 1
    assert re.search(r"cuda:2\s+\S+ GiB\s+11.5 GiB\s+\S+ GiB too much", refused.err)
    assert re.search(r"dtype=bfloat16 optimizer=sgd rows=1 +cuda:0", refused.err)
    assert re.search(r"training=false +cuda:0, cuda:1", refused.err)


@pytest.mark.slow
def test_seven_billion_parameters_are_placed_for_inference_on_cards_that_are_not_here(command: Command) -> None:
    devices = "devices=2xRTX4090+1xRTX3060+cpu-64GiB"
    shown = command("plan", "model=transformer_7b", "rows=4", devices, "training=false", "format=json")

    assert shown.code == 0, shown.err
    plan = Plan.from_json(shown.out)
    assert not plan.training
    assert sum(stage.parameters for stage in plan.stages) > 6.7e9
    assert all(need.memory_bytes <= need.limit_bytes for need in plan.forecast.devices)  # type: ignore[union-attr]
    assert any("data sheet" in note for note in plan.notes)


def test_rates_that_nobody_knows_are_assumed_and_named(command: Command) -> None:
    shown = command("plan", *SMALL, "devices=2x24GiB+cpu-64GiB", "training=false")

    assert shown.code == 0, shown.err
    assert "assume" in shown.out


def test_a_saved_plan_is_obeyed_by_a_run(command: Command, saved: Path) -> None:
    ran = command(
        "train", "experiment=digits", "devices=emulated", f"placement.plan={saved}", "trainer.max_epochs=1", *QUIET
    )

    assert ran.code == 0, ran.err
    (folder,) = ran.folders
    obeyed = Plan.from_json((folder / "logs" / "hetero_plan.json").read_text())
    assert obeyed.device_of == Plan.from_json(saved.read_text()).device_of


def test_a_simulation_needs_the_files_only(command: Command, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    words = (*SMALL, "model.vocabulary=64", "devices=emulated", "placement=even")
    assert command("plan", *words, f"save={saved}").code == 0
    shown = command("simulate", f"plan={saved}", "micro_batches=[1,2,100]", "links=[1GB/s,16GB/s]")

    assert shown.code == 0, shown.err
    rows = re.findall(r"│\s+(\d.*?) │ as planned │ (\S+)\s*│", shown.out)
    counts = ("1", "2", "100, runs as 4")  # there are four rows
    assert rows == [(count, rate) for rate in ("1GB/s", "16GB/s") for count in counts]
    assert re.search(r"^emulated:0\s+F0", shown.out, re.MULTILINE)


def test_what_does_not_fit_otherwise_is_planned_with_activation_checkpointing(command: Command, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    words = (*SMALL, "model.vocabulary=64", "model.context=64", "rows=32", "devices.request='cpu@mem=20MiB'")
    shown = command("plan", *words, "model.depth=6", f"save={saved}", "format=json")

    assert shown.code == 0, shown.err
    plan = Plan.from_json(shown.out)
    assert [stage.activation_checkpointing for stage in plan.stages] == [True]
    assert "Nothing fits with all activations kept" in " ".join(plan.notes)
    (row,) = json.loads(command("simulate", f"plan={saved}", "format=json").out)
    assert row["fits"]
    assert row["forecast"]["step_s"] == plan.forecast.step_s  # type: ignore[union-attr]
    kept = command("plan", *words, "model.depth=6", "schedule.activation_checkpointing=false")
    assert "Nothing fits" not in kept.out
    assert kept.code == 1


def test_a_simulation_says_that_a_model_whose_rows_depend_on_each_other_runs_whole(
    command: Command, saved: Path
) -> None:
    shown = command("simulate", f"plan={saved}", "micro_batches=4")

    assert shown.code == 0, shown.err
    assert shown.out.startswith("whole, 1 micro-batch, not 4\n")


def test_a_simulation_as_data(command: Command, saved: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    assert command("simulate", f"plan={saved}", "format=trace", f"output={trace}").code == 0
    assert json.loads(trace.read_text())["traceEvents"]
    shown = json.loads(command("simulate", f"plan={saved}", "format=json").out)
    (only,) = shown if isinstance(shown, list) else shown["outcomes"]
    assert Timeline.from_dict(only["timeline"]).makespan_s > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "optimizer=adm"), "optimizer='adm' is not known. Did you mean 'adam'?"),
        (("plan", "format=tabel"), "format='tabel' is not known; it may be"),
        (("plan", "rows=0"), "rows=0 must be a whole number from 1 on"),
        (("plan", "dtype=float31"), "dtype='float31' is not known"),
        (("plan", "trainin=false"), "Did you mean 'training'?"),
        (("plan", "devices=2xRTX4091+cpu"), "rtx4090"),
        (("plan", "devices=nowhere.yaml"), "nowhere.yaml"),
        (("simulate",), "plan"),
        (("simulate", "plan=nowhere.json"), "nowhere.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_answered_without_a_traceback(words: tuple[str, ...], said: str, command: Command) -> None:
    refused = command(*words)

    assert refused.code == 1
    assert said in refused.err
    assert "Traceback" not in refused.err + refused.out


def test_links_that_are_no_rate_and_devices_of_other_names_are_refused(command: Command, saved: Path) -> None:
    assert "links" in command("simulate", f"plan={saved}", "links=fast").err
    refused = command("simulate", f"plan={saved}", "devices=2xRTX4090+cpu")
    assert refused.code == 1
    assert "the plan uses emulated:0, emulated:1, emulated:2, which devices=" in refused.err


def test_costs_that_were_lost_or_damaged_are_refused(command: Command, saved: Path) -> None:
    costs = saved.with_name("plan.costs.json")
    costs.write_text(costs.read_text()[:-20])
    assert "plan.costs.json" in command("simulate", f"plan={saved}").err
    costs.unlink()
    refused = command("simulate", f"plan={saved}")
    assert refused.code == 1
    assert "plan.costs.json" in refused.err


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda costs: costs.pop("graph"), "KeyError: 'graph'"),
        (lambda costs: costs.update(graph=[]), "TypeError"),
        (lambda costs: costs["graph"]["units"][0].update(surprise=1), "surprise"),
        (lambda costs: costs["graph"]["units"][0].update(aliases=3), "TypeError"),
        (lambda costs: costs["inventory"].clear(), "devices"),
        (lambda costs: costs["workload"].clear(), "units"),
    ],
)
def test_costs_with_wrong_content_are_refused_by_name(
    command: Command, saved: Path, damage: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    path = saved.with_name("plan.costs.json")
    costs = json.loads(path.read_text())
    damage(costs)
    path.write_text(json.dumps(costs))
    refused = command("simulate", f"plan={saved}")

    assert refused.code == 1
    assert f"{str(path)!r} is damaged (" in refused.err
    assert complaint in refused.err
    assert "make the plan again" in refused.err


def test_costs_that_are_no_text_are_refused(command: Command, saved: Path) -> None:
    saved.with_name("plan.costs.json").write_bytes(b"\x86\xff\x00")
    refused = command("simulate", f"plan={saved}")

    assert refused.code == 1
    assert "plan.costs.json' is not valid JSON" in refused.err


def test_a_plan_with_a_unit_that_its_model_lacks_is_refused(command: Command, saved: Path) -> None:
    plan = json.loads(saved.read_text())
    plan["stages"][0]["units"].append("nope")
    saved.write_text(json.dumps(plan))
    refused = command("simulate", f"plan={saved}")

    assert refused.code == 1
    assert "the plan places 'nope', which is no unit of this model" in refused.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("plan", "save=3"), "save=3 is not a text; write for example save=plan.json"),
        (("plan", "output=[a]"), "output=['a'] is not a text"),
        (("plan", "save=missing/p.json"), "'missing/p.json' cannot be written: there is no folder 'missing'"),
        (("plan", "rows=true"), "rows=True must be a whole number"),
        (("plan", "measure=perhaps"), "measure='perhaps' must be true or false"),
        (("plan", "placement.time_limit_s=-1"), "placement.time_limit_s=-1.0 must be a number of seconds above 0"),
        (("plan", "devices=null"), "devices=null is no file of the group 'devices'"),
        (("simulate", "plan=3"), "plan=3 is not a text; write for example plan=plan.json"),
        (("simulate", "plan=null"), "no plan is given"),
        (("simulate", "plan=plan.json", "output=3"), "output=3 is not a text"),
        (
            ("simulate", "plan=plan.json", "output=missing/x"),
            "'missing/x' cannot be written: there is no folder 'missing'; make it, or choose",
        ),
        (("compare", "output=missing/x"), "'missing/x' cannot be written: there"),  # before anything is measured
    ],
)
def test_a_key_with_a_value_that_cannot_be_is_refused_before_the_work(
    command: Command, words: tuple[str, ...], complaint: str
) -> None:
    refused = command(*words)

    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith(f"lightning-hetero {words[0]}: {complaint}")
    assert "Traceback" not in refused.err


def test_devices_of_a_file_are_named_and_not_spelt_out(command: Command, saved: Path) -> None:
    shown = command("simulate", f"plan={saved}", "devices=emulated")

    assert shown.code == 0, shown.err
    assert "devices emulated:0, emulated:1, emulated:2" in shown.out
    assert "'kind'" not in shown.out
