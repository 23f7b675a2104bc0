"""The manifest of an exported directory: what its files are, as data without code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from lightning_hetero.errors import ArtifactError
from lightning_hetero.export.structure import Structure
from lightning_hetero.plan.read import read_record

__all__ = ["FILE", "Artifact", "Manifest", "StageRecord", "Value", "record_file"]

FORMAT = "lightning_hetero.export"
VERSION = 1
FILE = "manifest.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A tensor that goes into a stage or comes out of it.

    Attributes:
        name: Unique in the chain.
        shape: Size of each dimension; None where it follows the batch.
        dtype: As torch calls it: "float32".
        batch_dim: The dimension that is the batch; None if no dimension is exactly that.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    batch_dim: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file of the directory.

    Attributes:
        name: Plain name, without folders.
        bytes: Its size.
        sha256: Hexadecimal.
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """One stage of the chain.

    Attributes:
        name: "stage0", "stage1", ...
        units: The units of the model that it has operations of.
        source_device: Where the plan had it.
        target: Where it is to run: "onnx:CPUExecutionProvider".
        files: The first one is what the target opens.
        inputs: What it takes, in the order of its program.
        outputs: What it gives, in the order of its program.
        affinity: For targets that spread a stage over devices: the device of each operation, [operation, device].
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("affinity",)

    name: str
    units: tuple[str, ...]
    source_device: str
    target: str
    files: tuple[Artifact, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    affinity: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an exported directory holds.

    Attributes:
        model: Name of the module's class.
        made_with: Versions of the packages that took part, [package, version].
        rows_independent: Whether a batch may be cut and the results joined; tried out at the export.
        stages: In the order in which they run.
        inputs: The tensors of the arguments, in order.
        outputs: The tensors of the result, in order.
        input_structure: How the arguments nest, as a tuple of positional ones and a dict of those by keyword.
        output_structure: How the result nests.
    """

    model: str
    made_with: tuple[tuple[str, ...], ...]
    rows_independent: bool
    stages: tuple[StageRecord, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    input_structure: Structure
    output_structure: Structure

    def to_json(self) -> str:
        """The manifest as text that `from_json` reads back."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: It is no manifest, newer than this package, damaged, or names a file elsewhere.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{FILE} is not valid JSON ({error}); it was cut short or edited") from error
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ArtifactError(f"{FILE} is not of this package: the field 'format' must be {FORMAT!r}")
        if data.get("version") != VERSION:
            raise ArtifactError(
                f"{FILE} has version {data.get('version')!r}, this package reads version {VERSION}. "
                "Use the lightning-hetero that exported the model, or export it again."
            )
        record = {name: value for name, value in data.items() if name not in ("format", "version")}
        readers = {"input_structure": dict, "output_structure": dict}
        try:
            manifest = read_record(cls, record, readers=readers)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtifactError(f"{FILE} is damaged: {type(error).__name__}: {error}") from error
        manifest._check()
        return manifest

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a directory, and check every file that it names.

        Raises:
            ArtifactError: There is none, it cannot be believed, or a file is missing, damaged or elsewhere.
        """
        try:
            text = (directory / FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"{directory} is not an exported model: {FILE} cannot be read ({error}). "
                "Give the directory that lightning_hetero.export wrote."
            ) from error
        manifest = cls.from_json(text)
        for stage in manifest.stages:
            for artifact in stage.files:
                _check_file(directory, artifact, stage.name)
        return manifest

    def _check(self) -> None:
        """Raise unless every value is there when a stage, or the result, needs it."""
        known = {value.name for value in self.inputs}
        for stage in self.stages:
            if not stage.files:
                raise ArtifactError(f"{FILE}: {stage.name} has no files")
            for artifact in stage.files:
                if not _PLAIN_NAME.fullmatch(artifact.name):
                    raise ArtifactError(
                        f"{FILE}: {stage.name} names the file {artifact.name!r}. Files of an export lie beside "
                        "the manifest and have plain names; this one was edited, and is not opened."
                    )
            _check_known(stage.name, stage.inputs, known)
            known |= {value.name for value in stage.outputs}
        _check_known("the result", self.outputs, known)


def record_file(path: Path) -> Artifact:
    """Size and hash of a file."""
    return Artifact(name=path.name, bytes=path.stat().st_size, sha256=_sha256(path))


def _check_known(who: str, needed: tuple[Value, ...], known: set[str]) -> None:
    missing = next((value.name for value in needed if value.name not in known), None)
    if missing is not None:
        raise ArtifactError(f"{FILE}: {who} needs {missing!r}, which no stage before it gives; the file is damaged")


def _check_file(directory: Path, artifact: Artifact, stage: str) -> None:
    path = directory / artifact.name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ArtifactError(f"{stage}: {artifact.name} is a link to a file outside of {directory}, and is not opened")
    if not path.is_file():
        raise ArtifactError(f"{stage}: the file {artifact.name} is missing from {directory}. Copy it, or export again.")
    found = path.stat().st_size
    if found != artifact.bytes or _sha256(path) != artifact.sha256:
        size = f", {found} bytes instead of {artifact.bytes}" if found != artifact.bytes else ""
        raise ArtifactError(
            f"{stage}: {artifact.name} is not the file that was exported (its SHA-256 differs{size}). "
            "It was damaged or replaced; copy it again, or export again."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
