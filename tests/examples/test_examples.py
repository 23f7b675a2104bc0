"""Every example runs as it stands, and short."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_example(run_forked: RunPython, tmp_path: Path) -> RunPython:
    """Runs an example in `tmp_path`: `run_example("01_five_lines.py", NAME="value")`."""

    def run(name: str, *words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        ran = run_forked(str(EXAMPLES / name), *words, folder=tmp_path, OMP_NUM_THREADS="1", **environment)
        assert ran.returncode == code, ran.stderr
        return ran

    return run


def test_every_example_is_run_here_and_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert {path.name for path in files} == set(re.findall(r'"(\d\d_\w+\.py)"', Path(__file__).read_text()))
    assert all(len(path.read_text().splitlines()) < 80 for path in files)


def test_five_lines(run_example: RunPython) -> None:
    ran = run_example(
        "01_five_lines.py",
        HETERO_DEVICES="cpu@speed=1,cpu@speed=0.5",
        HETERO_PLACEMENT="even",
    )
    assert "emulated:1" in ran.stdout
    accuracy = re.search(r"test/acc\s+│\s+(\d\.\d+)", ran.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.96


@pytest.mark.parametrize("words", [(), ("--torchscript",)], ids=["eager", "torchscript"])
def test_plain_pytorch(run_example: RunPython, words: tuple[str, ...]) -> None:
    lines = run_example("02_plain_pytorch.py", *words).stdout.splitlines()
    stages, epochs, result = lines[:2], lines[2:-1], lines[-1]
    assert len({stage.partition(": ")[0] for stage in stages}) == 2
    assert len(epochs) == 6
    assert float(result.removeprefix("accuracy ")) > 0.93


def test_device_map(run_example: RunPython) -> None:
    lines = run_example("03_device_map.py").stdout.splitlines()
    stages = [line for line in lines if re.match("(large|small): ", line)]
    assert [stage.partition(": ")[0] for stage in stages] == ["large", "small", "large"]
    assert stages[1].startswith("small: blocks.2.")
    assert stages[1].endswith(", norm")


def test_device_map_under_a_limit_that_is_too_small_says_so(run_example: RunPython) -> None:
    ran = run_example("03_device_map.py", "--small", "1MiB", code=1)
    assert "The map does not fit:" in ran.stderr
    assert "on 'small', which has 1.00 MiB" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_own_policy(run_example: RunPython) -> None:
    printed = run_example("04_own_policy.py").stdout
    assert re.findall("^(near|far): ", printed, re.MULTILINE) == ["near", "far", "near"]  # the head is the embedding
    fuller = run_example("04_own_policy.py", "--full", "0.9").stdout
    assert re.findall("^(near|far): ", fuller, re.MULTILINE) == ["near"]


def test_what_happened(run_example: RunPython, tmp_path: Path) -> None:
    printed = run_example("05_what_happened.py", "--folder", str(tmp_path)).stdout
    assert re.search(r"emulated:0 .*F.*B", printed), printed
    assert json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert "hetero/bubble_share" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_fabric(run_example: RunPython) -> None:
    spread = run_example("06_fabric.py", HETERO_DEVICES="cpu@speed=1,cpu@speed=1", HETERO_PLACEMENT="even").stdout
    assert "emulated:1" in spread
    accuracy = re.search(r"accuracy (\d\.\d+)", spread)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9


def test_notebook(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("torch.Size([1, 10])" in output.get("text", "") for output in outputs)


def test_export(run_example: RunPython) -> None:
    printed = run_example("07_export.py", CI="true").stdout  # OpenVINO reports nothing home then
    assert re.findall(r"^stage\d: emulated:\d -> (\w+)", printed, re.MULTILINE) == ["onnx", "openvino", "torch"]
    difference, chain, alone = re.search(  # type: ignore[union-attr]
        r"largest difference (\S+)\naccuracy (\S+), of the model itself (\S+)", printed
    ).groups()
    assert float(difference) < 1e-5
    assert chain == alone
