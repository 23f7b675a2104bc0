"""Exports a module: one trace, cut into stages, each written for its target, and a manifest."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path

import torch
from torch import nn

import lightning_hetero
from lightning_hetero.devices.spec import DeviceSpec
from lightning_hetero.errors import TargetError
from lightning_hetero.export.cut import Piece, UnitOf, cut
from lightning_hetero.export.deploy import target_of
from lightning_hetero.export.manifest import FILE, Manifest, StageRecord, Value, record_file
from lightning_hetero.export.placed import device_names
from lightning_hetero.export.rows import rows_are_independent
from lightning_hetero.export.stage import examples_of, stage_program, value_of, with_parts
from lightning_hetero.export.targets import Saved, StageProgram, find_target
from lightning_hetero.export.trace import Trace, trace
from lightning_hetero.placement.names import REST, did_you_mean, listing
from lightning_hetero.plan.plan import Plan

DEFAULT_TARGET = "torch:cpu"
AUTO = "auto"
"""Targets that are the devices of the placement: "dla:0" for "dla:0", "torch:cuda:0" for "cuda:0"."""


def export(
    module: nn.Module,
    directory: str | PathLike[str],
    *,
    example_inputs: object,
    targets: str | Mapping[str, str] = DEFAULT_TARGET,
    placement: Plan | Mapping[str, str] | None = None,
    affinity: Mapping[str, str] | None = None,
    dynamic_batch: bool = True,
    overwrite: bool = False,
) -> Manifest:
    """Write a trained module as a chain of stages for other runtimes.

    The module's `forward` is captured once, in eval mode, and cut where the device changes. The module itself stays
    as it is.

    Args:
        module: The module, on any devices. A LightningModule is one.
        directory: Where the files go. Made if need be; it must be empty.
        example_inputs: What `forward` takes: a tuple of positional arguments, a mapping of keyword arguments, or one
            tensor; at least two rows.
        targets: One target for all stages, or a target for each stage ("stage0") or source device ("cuda:0"), with ""
            or "*" for the others. Targets are written `family:device`: "torch:cpu", "onnx:CPUExecutionProvider",
            "openvino:CPU", "aoti:cpu", "torchscript:cpu". "auto": each stage for the device that the placement names,
            as in a plan of `plan_deployment`.
        placement: The plan of the training, or a new device map for the deployment, module name to any name of a
            device, with "" for the rest. None: where the parameters are now.
        affinity: For targets that spread a stage over devices themselves ("openvino:HETERO:GPU,CPU"): module name to
            device, with "" for the rest.
        dynamic_batch: False fixes the batch at the size of the example.
        overwrite: Replace an export that is in the directory already.

    Returns:
        The manifest, as it was written.

    Raises:
        UnsupportedError: The module cannot be captured, see `trace`.
        PlacementError: The placement is not one of this module.
        TargetError: A target is unknown, not installed, or cannot take its stage; or the directory is not empty.
    """
    directory = Path(directory)
    _check_directory(directory, overwrite)
    unit_of, device_of, root = device_names(module, placement)
    spread = device_names(module, affinity)[1] if affinity is not None else {}
    traced = trace(module, example_inputs, dynamic_batch=dynamic_batch)
    pieces, results = cut(traced.program, unit_of, device_of, root)
    if targets == AUTO:
        targets = {piece.device: _target_on(piece.device, placement) for piece in pieces}
    chosen = _targets(targets, pieces)
    for target in chosen:
        find_target(target)  # before the work, not after the half of it
    directory.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        manifest = _write(folder, module, traced, pieces, results, chosen, unit_of, spread)
        if directory.exists():
            shutil.rmtree(directory)
        folder.chmod(0o755)
        folder.rename(directory)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return manifest


def _write(
    folder: Path,
    module: nn.Module,
    traced: Trace,
    pieces: Sequence[Piece],
    results: tuple[str, ...],
    targets: Sequence[str],
    unit_of: UnitOf,
    spread: Mapping[str, str],
) -> Manifest:
    values = examples_of(pieces, traced.examples)
    inputs = tuple(
        value_of(f"input{index}", example, dims, traced.batch)
        for index, (example, dims) in enumerate(zip(traced.examples, traced.dims, strict=True))
    )
    known = {value.name: value for value in inputs}
    stages = []
    for index, (piece, name) in enumerate(zip(pieces, targets, strict=True)):
        for value, dims in piece.dims.items():
            known[value] = value_of(value, values[value], dims, traced.batch)
        target, device = find_target(name)
        stage = stage_program(f"stage{index}", piece, values)
        if spread and "," in device:  # several devices, and somebody says which operation is for which
            stage = with_parts(stage, piece, values, unit_of, spread)
        stages.append(_record(stage, piece, name, target.save(stage, folder, device), known))
    manifest = Manifest(
        model=type(module).__name__,
        made_with=_versions(targets),
        rows_independent=rows_are_independent(traced, [known[name] for name in results]),
        stages=tuple(stages),
        inputs=inputs,
        outputs=tuple(known[name] for name in results),
        input_structure=traced.inputs,
        output_structure=traced.outputs,
    )
    (folder / FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _record(
    stage: StageProgram,
    piece: Piece,
    target: str,
    saved: Saved,
    known: Mapping[str, Value],
) -> StageRecord:
    return StageRecord(
        name=stage.name,
        units=piece.units,
        source_device=piece.device,
        target=target,
        files=tuple(map(record_file, saved.files)),
        inputs=tuple(known[name] for name in piece.inputs),
        outputs=tuple(known[name] for name in piece.outputs),
        affinity=saved.affinity,
    )


def _check_directory(directory: Path, overwrite: bool) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if overwrite and (directory / FILE).is_file():
        return
    if overwrite:
        raise TargetError(f"{directory} is there and is no export of a model, so it is not replaced. Choose another.")
    raise TargetError(f"{directory} is not empty. Choose another directory, or pass overwrite=True to replace it.")


def _targets(targets: str | Mapping[str, str], pieces: Sequence[Piece]) -> list[str]:
    """The target of each stage."""
    if isinstance(targets, str):
        return [targets] * len(pieces)
    names = [f"stage{index}" for index in range(len(pieces))]
    devices = [piece.device for piece in pieces]
    for key in targets:
        if key not in {*REST, *names, *devices}:
            raise TargetError(
                f"targets: there is no stage {key!r}.{did_you_mean(key, [*names, *devices])} "
                f"The stages are {', '.join(f'{n} (on {d})' for n, d in zip(names, devices, strict=True))}."
            )
    rest = next((targets[key] for key in REST if key in targets), None)
    chosen = [targets.get(name, targets.get(device, rest)) for name, device in zip(names, devices, strict=True)]
    left = [name for name, target in zip(names, chosen, strict=True) if target is None]
    if left:
        raise TargetError(f"targets leaves out {listing(left)}. Add them, or a target for the rest: '': 'torch:cpu'.")
    return [target for target in chosen if target is not None]


def _target_on(device: str, placement: Plan | Mapping[str, str] | None) -> str:
    """The target that a device of the placement is."""
    if isinstance(placement, Plan):
        return target_of(placement.inventory[device])
    try:
        place = str(torch.device(device))
    except RuntimeError:  # torch has no type of this name
        place = None
    return target_of(DeviceSpec(name=device, kind="", memory_bytes=1, torch_device=place, trainable=place is not None))


def _versions(targets: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    packages = {name for target in targets for name in find_target(target)[0].packages.values()}
    found = [("lightning-hetero", lightning_hetero.__version__), ("torch", torch.__version__)]
    for package in sorted(packages):
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:  # another build of it, under another name
            found.append((package, "unknown"))
    return tuple(found)
