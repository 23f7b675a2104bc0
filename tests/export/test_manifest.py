"""An exported directory is read with suspicion: damage and paths to elsewhere are found before anything is opened."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hetero.export import ArtifactError, HeteroRuntime, Manifest, TargetError, export
from lightning_hetero.testing.models import MLP

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "exported"
    export(MLP(), folder, example_inputs=torch.rand(2, 8), placement={"": "a", "third": "b"})
    return folder


@pytest.fixture
def exported(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "exported"))


def edit(folder: Path, change: Edit) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        HeteroRuntime(folder)
    return str(caught.value)


def test_the_directory_holds_data_that_says_what_it_is(exported: Path) -> None:
    data = json.loads((exported / "manifest.json").read_text())

    assert sorted(path.name for path in exported.iterdir()) == ["manifest.json", "stage0.pt2", "stage1.pt2"]
    assert (data["format"], data["version"], data["model"]) == ("lightning_hetero.export", 1, "MLP")
    assert data["inputs"] == [{"name": "input0", "shape": [None, 8], "dtype": "float32", "batch_dim": 0}]
    assert [(s["name"], s["units"], s["source_device"], s["target"]) for s in data["stages"]] == [
        ("stage0", ["first", "second"], "a", "torch:cpu"),
        ("stage1", ["third"], "b", "torch:cpu"),
    ]
    assert dict(data["made_with"])["torch"] == torch.__version__


def test_it_reads_what_it_wrote(exported: Path) -> None:
    manifest = Manifest.read(exported)

    assert Manifest.from_json(manifest.to_json()) == manifest


def test_one_changed_byte_is_found(exported: Path) -> None:
    path = exported / "stage1.pt2"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    assert refusal(exported) == (
        "stage1: stage1.pt2 is not the file that was exported (its SHA-256 differs). "
        "It was damaged or replaced; copy it again, or export again."
    )


def test_a_file_that_was_cut_short_is_found(exported: Path) -> None:
    path = exported / "stage0.pt2"
    path.write_bytes(path.read_bytes()[:100])

    assert re.search(r"its SHA-256 differs, 100 bytes instead of \d+\)", refusal(exported))


def test_a_missing_file_is_named(exported: Path) -> None:
    (exported / "stage0.pt2").unlink()

    assert refusal(exported).startswith("stage0: the file stage0.pt2 is missing from ")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", "a\\b", ".hidden", "", "C:x"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(exported: Path, name: str) -> None:
    (exported.parent.parent / "x").write_text("not ours")
    edit(exported, lambda data: data["stages"][1]["files"][0].update(name=name))

    assert refusal(exported) == (
        f"manifest.json: stage1 names the file {name!r}. Files of an export lie beside the manifest and have plain "
        "names; this one was edited, and is not opened."
    )


def test_a_link_to_elsewhere_is_refused(exported: Path) -> None:
    outside = exported.parent / "outside.pt2"
    (exported / "stage0.pt2").rename(outside)
    (exported / "stage0.pt2").symlink_to(outside)

    assert refusal(exported) == f"stage0: stage0.pt2 is a link to a file outside of {exported}, and is not opened"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(version=2),
            "manifest.json has version 2, this package reads version 1. Use the lightning-",
        ),
        (lambda d: d.update(format="x"), "manifest.json is not of this package: the field 'format' must be"),
        (lambda d: d.pop("stages"), "manifest.json is damaged: KeyError: 'stages'"),
        (lambda d: d.update(code="import os"), "manifest.json is damaged: TypeError: a Manifest has no field 'code'"),
        (lambda d: d["stages"].reverse(), "manifest.json: stage1 needs 'tanh', which no stage before it gives"),
        (lambda d: d["stages"][0].update(files=[]), "manifest.json: stage0 has no files"),
        (
            lambda d: d["inputs"][0].update(shape=[-1, 8]),
            "manifest.json is damaged: TypeError: expected a whole number",
        ),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(exported: Path, change: Edit, message: str) -> None:
    edit(exported, change)

    assert refusal(exported).startswith(message)


def test_a_result_that_nests_in_an_unknown_way_is_refused(exported: Path) -> None:
    edit(exported, lambda data: data.update(output_structure={"object": "os.system"}))
    with (
        HeteroRuntime(exported) as runtime,
        pytest.raises(ArtifactError, match=r"nests tensors in a way that is unknown here"),
    ):
        runtime(torch.rand(2, 8))


def test_text_that_is_no_json_and_no_directory(exported: Path, tmp_path: Path) -> None:
    (exported / "manifest.json").write_text('{"format": ')

    assert refusal(exported).startswith("manifest.json is not valid JSON (")
    assert refusal(tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'} is not an exported model: manifest.json")


def test_an_export_replaces_nothing_that_it_was_not_told_to(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"is not empty\. Choose another directory, or pass overwrite=True"):
        export(MLP(), exported, example_inputs=torch.rand(2, 8))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("")
    with pytest.raises(TargetError, match=r"is there and is no export of a model, so it is not replaced"):
        export(MLP(), tmp_path / "thesis", example_inputs=torch.rand(2, 8), overwrite=True)

    export(MLP(), exported, example_inputs=torch.rand(2, 8), overwrite=True)
    assert sorted(path.name for path in exported.iterdir()) == ["manifest.json", "stage0.pt2"]


def test_an_export_that_fails_leaves_what_was_there(exported: Path) -> None:
    before = sorted(path.name for path in exported.parent.iterdir())
    with pytest.raises(TargetError, match="no such device"):
        export(MLP(), exported, example_inputs=torch.rand(2, 8), targets="aoti:xpu:7", overwrite=True)

    assert sorted(path.name for path in exported.parent.iterdir()) == before
    assert HeteroRuntime(exported).manifest.model == "MLP"
