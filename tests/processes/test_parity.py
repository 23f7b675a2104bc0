"""One process and several give the same results: parameters, logs, predictions, and which rows were seen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jobs
import launch
import pytest
import torch

JOBS = {
    2: [
        "even",
        "third-accumulate",
        "third-norm",
        "even-manual",
        "third-clip",
        "third-single",
        "third-pipeline-accumulate",
        "third-pipeline-in-parts",
        "third-pipeline-norm",
        "third-pipeline-measured",
        "third-norm-again",
        "third-accelerator",
        "even-devices",
        "third-devices-accumulate-norm",
        "even-devices-mixed",
        "even-devices-broken",
        "own-part",
    ],
    3: ["even-accumulate-norm", "five", "five-norm", "five-single"],
}


@pytest.fixture(scope="module", params=JOBS)
def several(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What each process says of each job."""
    folder, size = tmp_path_factory.mktemp("jobs"), request.param
    ended = launch.run([jobs.__file__, str(folder), ",".join(JOBS[size])], size)
    for process in ended:
        assert process.code == 0, process.text
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(size)]
        for name in JOBS[size]
    }


def test_one_process_and_several_give_the_same(several: dict[str, list[dict[str, Any]]]) -> None:
    for name, ranks in several.items():
        alone = jobs.run(name)
        for result in ranks:
            for key, value in alone["state"].items():
                torch.testing.assert_close(result["state"][key], value, rtol=0, atol=1e-12, msg=f"{name}: {key}")
            whole = {key for key in alone["metrics"] if "single" not in name or key != "loss_step"}
            assert {key: result["metrics"][key] for key in whole} == pytest.approx(
                {key: alone["metrics"][key] for key in whole}, abs=1e-12
            ), name
            if "single" not in name:  # there, most steps are those of one process
                assert result["losses"] == pytest.approx(alone["losses"], abs=1e-12), name
        seen = {phase: Counter(rows) for phase, rows in alone["seen"].items()}
        together = {phase: sum((Counter(r["seen"].get(phase, [])) for r in ranks), Counter()) for phase in seen}
        assert together == seen, name
        for batch, expected in enumerate(alone["predictions"]):
            parts = [r["predictions"][batch] for r in ranks if r["predictions"][batch] is not None]
            torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-12)


def test_unequal_processes_get_unequal_parts(several: dict[str, list[dict[str, Any]]]) -> None:
    for name, ranks in several.items():
        rows = [len(result["seen"]["train0"]) for result in ranks]
        shares = [2, 3, 5] if "five" in name else [1, 3] if "third" in name else [1] * len(ranks)
        if name == "own-part":
            assert rows == [len(part) for part in jobs.OWN_PARTS]
            continue
        for got, share in zip(rows, shares, strict=True):
            assert abs(got - jobs.ROWS * share / sum(shares)) <= 1, (name, rows)


def test_devices_of_one_type_exchange_gradients_without_host_memory(several: dict[str, list[dict[str, Any]]]) -> None:
    for name, ranks in several.items():
        for result in ranks:
            summed = result.get("sums", [])
            if "devices" not in name or "mixed" in name or "broken" in name:
                assert not summed, name
            else:
                assert summed[0] == 2, name  # a trial, then a bucket for each step of the optimizer
                assert len(set(summed[1:])) == 1, name
                assert len(summed) > 10, name
