"""`benchmarks/planner.py` reads the three public formats, finds their optima and says how far it is from others."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PLANNER = str(Path(__file__).parents[2] / "benchmarks" / "planner.py")
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def node(number: int, accelerator: float, cpu: float, **more: object) -> dict[str, object]:
    return {
        "id": number,
        "supportedOnFpga": 1,
        "fpgaLatency": accelerator,
        "cpuLatency": cpu,
        "isBackwardNode": 0,
        "size": 10.0,
        **more,
    }


# A row of four; nodes 11 and 14 must share a device, and the accelerator cannot run 13. Numbers need not begin at 0.
GRAPH = {
    "maxFPGAs": 2,
    "maxCPUs": 1,
    "maxSizePerFPGA": 20.0,
    "nodes": [
        node(11, 2.0, 20.0, colorClass=7),
        node(12, 4.0, 40.0),
        node(13, 0.1, 1.0, supportedOnFpga=0),
        node(14, 2.0, 20.0, colorClass=7),
    ],
    "edges": [{"sourceId": a, "destId": a + 1, "cost": 0.25} for a in (11, 12, 13)],
}
# Three layers. The link from a to b is named, the way back goes by types, that between others by place.
CHAIN = {
    "format": "hetero-chain/1",
    "micro_batches": 4,
    "schedule": "1f1b",
    "state_multiplier": 4,
    "fixed_bytes": 1,
    "layers": [
        {
            "fwd_s": {"quick": 1.0, "slow": 2.0},
            "bwd_s": {"quick": 2.0, "slow": 4.0},
            "update_s": {"quick": 0.5, "slow": 0.5},
            "param_bytes": 5,
            "act_out_bytes": 10,
            "act_mem_bytes": 10,
        }
    ]
    * 3,
    "devices": [
        {"name": "a", "type": "quick", "mem_bytes": 80, "node": 0},
        {"name": "b", "type": "slow", "mem_bytes": 1000, "node": 0, "allow_layers": [1, 2]},
        {"name": "c", "type": "slow", "mem_bytes": 10, "node": 1},
    ],
    "links": {
        "intra": {"by_type": {"default": {"lat_s": 0.0, "bw_Bps": 20.0}, "quick->slow": {"lat_s": 9.0, "bw_Bps": 1.0}}},
        "inter": {"lat_s": 1.0, "bw_Bps": 1.0},
        "pairs": {"a->b": {"lat_s": 0.5, "bw_Bps": 10.0}},
    },
}
SHARES = {
    "format": "dp-shares/1",
    "global_batch": 10,
    "sync_s": 0.5,
    "devices": [{"name": "a", "type": "quick"}, {"name": "b", "type": "slow"}],
    "step_s": {"quick": {"1": 1.0, "4": 2.0, "8": 2.5}, "slow": {"1": 1.5, "2": 2.0}},
    "max_micro_batch": {"quick": 4, "slow": 2},
}
BEST = {
    "instances": {
        "small/graph.json": {
            "best": {"max_load": {"value": 4.5}, "latency": {"value": 5.0}},
            "best_contiguous": {"max_load": {"value": 4.0}},
        },
        "small/shares.json": {"best": {"step_time": {"value": 4.5}}},
    }
}


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    for name, content in {"graph.json": GRAPH, "chain.json": CHAIN, "shares.json": SHARES, "best.json": BEST}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_small_instances_are_solved_and_compared(run_python: RunPython, instances: Path) -> None:
    files = [str(instances / name) for name in ("graph.json", "chain.json", "shares.json")]

    ran = run_python(
        PLANNER, *files, "--quick", "--best", str(instances / "best.json"), "--plans", str(instances / "plans")
    )

    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])["figures"]
    values = {name.removesuffix(".value"): value for name, value in figures.items() if name.endswith(".value")}
    gaps = {name.removesuffix(".gap_percent"): value for name, value in figures.items() if name.endswith("_percent")}
    # Graph: the host runs 13. Apart, the accelerators have 2 + 2 with 11 sent, 13 taken in, and 4 with both taken and
    # sent. On one accelerator, 11 and 14 need all of its room. In series, 12 waits for the end of the call of 11.
    assert values["small/graph.max_load"] == pytest.approx(4.5)
    assert gaps["small/graph.max_load"] == pytest.approx(0)
    # Chain: before another stage, a holds 1 + 20 + 2 x 10 bytes with one layer and 81 with two. It works 3 s and sends
    # for 1.5 s; b works 12 s and sends the gradient in 0.5 s.
    assert values["small/chain.max_load"] == pytest.approx(12.5)
    assert values["small/chain.step_formula"] == pytest.approx(4.5 + 12.5 * 4)
    assert values["small/chain.step_time"] == pytest.approx(1 + 1.5 + 12 * 4 + 0.5 + 2 + 1.0)
    # Shares: 8 and 2 rows in 4 s and 2 s; 6 and 4 in 4 s as well.
    assert values["small/shares.step_time"] == pytest.approx(4.5)
    assert gaps["small/shares.step_time"] == pytest.approx(0)


def test_plans_are_written_in_the_form_of_their_instance(run_python: RunPython, instances: Path) -> None:
    files = [str(instances / name) for name in ("graph.json", "chain.json", "shares.json")]

    run_python(PLANNER, *files, "--quick", "--plans", str(instances / "plans"))

    def plan(name: str) -> Any:
        return json.loads((instances / "plans" / f"small.{name}.json").read_text(encoding="utf-8"))

    homes = plan("graph.max_load")["assignment"]
    assert homes.keys() == {"11", "12", "13", "14"}
    assert homes["13"] == "cpu0"
    assert homes["11"] == homes["14"] != homes["12"]
    assert plan("chain.max_load") == {"stages": [{"device": "a", "layers": [0, 1]}, {"device": "b", "layers": [1, 3]}]}
    assert sum(plan("shares.step_time")["shares"].values()) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"format": "other/9"}', "has the format 'other/9'; known are dnnp"), ("{", "Expecting property name")],
)
def test_a_file_of_another_format_is_refused(run_python: RunPython, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")

    ran = run_python(PLANNER, str(path))

    assert ran.returncode == 2
    assert message in ran.stderr
