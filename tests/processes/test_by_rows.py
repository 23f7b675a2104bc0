"""Logs, metrics and gradients from places other than the loss of a step count rows, or are refused on every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import by_rows
import launch
import pytest
import torch


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes says of all cases, one after the other."""
    folder = tmp_path_factory.mktemp("by-rows")
    for process in launch.run([by_rows.__file__, str(folder)], 2):
        assert process.code == 0, process.text
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_what_is_logged_outside_of_steps_is_that_of_one_process(several: list[dict[str, Any]], tmp_path: Path) -> None:
    steps, metrics = by_rows.logs(tmp_path)
    for result in several:
        found, logged = result["logs"]
        assert found == [pytest.approx(step, abs=1e-12) for step in steps]
        assert logged.pop("val with a weight") == 1.5
        expected = {key: value for key, value in metrics.items() if key != "val with a weight"}
        assert logged == pytest.approx(expected, abs=1e-9)
        assert logged["val of outputs"] == pytest.approx(logged["val"], abs=1e-9)


def test_a_stateful_loader_goes_on_in_the_middle_of_an_epoch(several: list[dict[str, Any]]) -> None:
    for result in several:
        whole, again = result["resumed"]
        assert again == whole


@pytest.mark.parametrize(
    "case", ["data in setup", "closure", "product", "same split", "copied metrics", "choices", "cycled"]
)
def test_what_is_right_is_not_refused(several: list[dict[str, Any]], tmp_path: Path, case: str) -> None:
    alone = by_rows.SAME[case](tmp_path)
    for result in several:
        torch.testing.assert_close(result[case], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("not a loader", "UnsupportedError: data loader 1 is a Batches and no torch.utils.data.DataLoader"),
        ("other split", "UsageError: data loader 1 has a dataset with a Subset whose indices are not the same"),
        ("by hand", "UsageError: an optimizer has stepped with gradients that do not come from self.manual_backward"),
        ("raw", "UsageError: the gradients of this step come from loss.backward()"),
        ("by the clock", "UnsupportedError: Trainer(val_check_interval=...) is a time, and with several processes"),
        ("other names", "UsageError: process {rank} comes to the value that is logged as validation_step/{name}"),
    ],
)
def test_what_would_be_wrong_is_refused_on_every_process(several: list[dict[str, Any]], case: str, error: str) -> None:
    for rank, result in enumerate(several):
        assert result[case].startswith(error.format(rank=rank, name="AB"[rank])), result[case]


def test_a_hook_that_looks_into_a_batch_without_rows_is_told_why(several: list[dict[str, Any]]) -> None:
    texts = [result["hook without rows"] for result in several]
    assert any(text.startswith("UnsupportedError: this process has no rows of this batch") for text in texts), texts
    assert all("has no rows of this batch" in text for text in texts), texts


def test_a_process_does_not_wait_for_one_that_has_no_row_of_the_second_loader(several: list[dict[str, Any]]) -> None:
    text = several[1]["second loader"]
    assert text.startswith("UnsupportedError: values of a whole pass over the data are shared by all processes, but")
    assert "process 0 had no row of data loader 2" in text
