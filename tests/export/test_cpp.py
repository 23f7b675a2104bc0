"""The C++ program among the examples gives Python's numbers, without Python; and so does what AOTInductor compiles."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lightning_hetero.export import HeteroRuntime, Manifest, export
from lightning_hetero.testing.cut_models import Hourglass
from lightning_hetero.testing.models import MLP

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
TOOLS = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:target 'torchscript'"),
]
needs_tools = pytest.mark.skipif(bool(TOOLS), reason=f"needs {' and '.join(TOOLS)}")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", str(SOURCE), "-B", str(build), prefix], ["cmake", "--build", str(build)]):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return build / "run_chain"


def run(program: Path, folder: Path, rows: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, folder, str(rows)], capture_output=True, text=True, check=False, timeout=60)


def numbers(*shape: int) -> torch.Tensor:
    """The input that the program makes for itself."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).sin().reshape(shape).float()


@needs_tools
def test_a_partitioned_torchscript_model(program: Path, take_away: Any, tmp_path: Path) -> None:
    model = Hourglass().eval()
    placement = {"": "a", "down.2": "b", "up.0": "b"}
    manifest, runtime = take_away(model, torch.rand(2, 8), targets="torchscript:cpu", placement=placement)

    assert len(manifest.stages) == 3
    for rows in (1, 7):
        ran = run(program, tmp_path / "exported0", rows)
        assert ran.returncode == 0, ran.stderr
        found = torch.tensor([float(line) for line in ran.stdout.split()]).reshape(rows, 8)
        torch.testing.assert_close(found, runtime(numbers(rows, 8)), rtol=0, atol=1e-6)
        torch.testing.assert_close(found, model(numbers(rows, 8)).detach(), rtol=0, atol=1e-5)


class Chain(NamedTuple):
    """What was exported for AOTInductor and TorchScript in turn."""

    model: nn.Module
    folder: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """One for all tests, as AOTInductor compiles each of its stages for many seconds."""
    model, folder = MLP().eval(), tmp_path_factory.mktemp("chain") / "exported"
    targets = {"a": "aoti:cpu", "b": "torchscript:cpu", "c": "aoti:cpu"}
    placement = {"first": "a", "second": "b", "third": "c"}
    return Chain(
        model, folder, export(model, folder, example_inputs=torch.rand(2, 8), targets=targets, placement=placement)
    )


def test_aoti_runs_in_a_chain_for_any_number_of_rows_in_python(chain: Chain) -> None:
    assert [stage.target for stage in chain.manifest.stages] == ["aoti:cpu", "torchscript:cpu", "aoti:cpu"]
    with HeteroRuntime(chain.folder) as runtime:
        for rows in (1, 7, 64):
            x = torch.rand(rows, 8, generator=torch.Generator().manual_seed(rows))
            torch.testing.assert_close(runtime(x), chain.model(x).detach(), rtol=0, atol=1e-5)


@needs_tools
def test_aoti_runs_in_a_chain_for_any_number_of_rows_in_c_plus_plus(program: Path, chain: Chain) -> None:
    with HeteroRuntime(chain.folder) as runtime:
        for rows in (1, 7, 64):
            ran = run(program, chain.folder, rows)
            assert ran.returncode == 0, ran.stderr
            found = torch.tensor([float(line) for line in ran.stdout.split()]).reshape(rows, 4)
            torch.testing.assert_close(found, runtime(numbers(rows, 8)), rtol=0, atol=1e-6)
            torch.testing.assert_close(found, chain.model(numbers(rows, 8)).detach(), rtol=0, atol=1e-5)


@needs_tools
def test_what_it_does_not_run_is_said(program: Path, take_away: Any, tmp_path: Path) -> None:
    take_away(MLP(), torch.rand(2, 8))
    folder = tmp_path / "exported0"
    ran = run(program, folder, 2)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "run_chain: stage0 is for 'torch:cpu'; this program runs torchscript and aoti\n"

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"][0]["files"][0]["name"] = "../../x"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(program, folder, 2).stderr == "run_chain: the manifest names ../../x, which is not in the directory\n"
