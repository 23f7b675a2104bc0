"""Runs an exported directory: checks it, opens the stages, and runs them as a pipeline."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from lightning_hetero.errors import TargetError, UsageError
from lightning_hetero.export.call import result_of, tensors_of, values_of
from lightning_hetero.export.manifest import Manifest, StageRecord
from lightning_hetero.export.pipeline import Pipeline, Values
from lightning_hetero.export.targets import Run, find_target, opens
from lightning_hetero.export.trace import arguments
from lightning_hetero.placement.names import did_you_mean
from lightning_hetero.schedule.rows import split_rows


class HeteroRuntime:
    """An exported model, called as the module was: `HeteroRuntime("exported")(images)`.

    Files are checked against the hashes of the manifest, which shows damage. It does not show malice: an exported
    program runs code, so open only directories from people whom you would let run a program.

    Args:
        directory: What `export` wrote.
        overrides: Other targets for stages, by name: {"stage0": "torch:cuda:0"}. The family has to be the one that
            the file was written for; the device may be another.
        micro_batches: In how many parts a batch goes through the stages, each of which has a thread; None: as many as
            there are stages. A batch goes through whole where the manifest says that rows depend on each other.

    Raises:
        ArtifactError: The directory is damaged, unsafe, or of another version.
        TargetError: A target is not there, or cannot be what a stage runs on.
        UsageError: `micro_batches` is below 1.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        overrides: Mapping[str, str] | None = None,
        *,
        micro_batches: int | None = None,
    ) -> None:
        if micro_batches is not None and micro_batches < 1:
            raise UsageError(f"micro_batches={micro_batches!r} must be at least 1")
        directory = Path(directory)
        self.manifest = Manifest.read(directory)
        self.targets = _targets(self.manifest, overrides or {})
        self._micro_batches = micro_batches or len(self.manifest.stages)
        opened = [_open(directory, stage, self.targets[stage.name]) for stage in self.manifest.stages]
        self._pipeline = Pipeline([_step(stage, run) for stage, run in zip(self.manifest.stages, opened, strict=True)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the chain.

        Returns:
            What the module would have returned, nested in the same way, on the device of the first argument.

        Raises:
            UsageError: The arguments are not those that the model was exported with, but for the size of the batch.
        """
        leaves, rows = tensors_of(self.manifest, args, kwargs)
        results = self._pipeline.run([values_of(self.manifest, leaves, part) for part in self._parts(rows)])
        return result_of(self.manifest, leaves, results)

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Run batches that follow each other through the chain, each stage at work on another one.

        Batches go through whole, so this also overlaps stages where rows depend on each other. As many are on their
        way as there are stages, and one more.

        Args:
            batches: A tensor each; or a tuple of positional arguments, or a mapping of keyword arguments.

        Yields:
            What `self(batch)` returns, in order.

        Raises:
            UsageError: As for a call.
        """
        under_way: deque[tuple[list[Tensor], Future[Values]]] = deque()
        for batch in batches:
            leaves, _ = tensors_of(self.manifest, *arguments(batch))
            under_way.append((leaves, self._pipeline.submit(values_of(self.manifest, leaves))))
            if len(under_way) > len(self.manifest.stages):
                leaves, end = under_way.popleft()
                yield result_of(self.manifest, leaves, [end.result()])
        for leaves, end in under_way:
            yield result_of(self.manifest, leaves, [end.result()])

    def close(self) -> None:
        """End the threads of the stages. Calling it again does no harm."""
        self._pipeline.close()

    def __enter__(self) -> HeteroRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _parts(self, rows: int | None) -> list[slice | None]:
        if rows is None or not self.manifest.rows_independent:
            return [None]
        parts: list[slice | None] = []
        begin = 0
        for size in split_rows(rows, self._micro_batches):
            parts.append(slice(begin, begin + size))
            begin += size
        return parts


def _targets(manifest: Manifest, overrides: Mapping[str, str]) -> dict[str, str]:
    names = [stage.name for stage in manifest.stages]
    for name in overrides:
        if name not in names:
            raise TargetError(
                f"overrides: there is no stage {name!r}.{did_you_mean(name, names)} Stages are {', '.join(names)}."
            )
    targets = {stage.name: overrides.get(stage.name, stage.target) for stage in manifest.stages}
    for stage in manifest.stages:
        if not opens(stage.target, targets[stage.name]):
            raise TargetError(
                f"overrides: {stage.name} was written for {stage.target!r}, which {targets[stage.name]!r} cannot open. "
                f"Choose another device of {stage.target.partition(':')[0]!r}, or export again with that target."
            )
    return targets


def _open(directory: Path, stage: StageRecord, name: str) -> Run:
    try:
        target, device = find_target(name)
        target.check(device)
        return target.load(directory / stage.files[0].name, device, _pairs(stage.affinity))
    except TargetError as error:
        raise TargetError(f"{stage.name}: {error}") from error


def _pairs(affinity: tuple[tuple[str, ...], ...]) -> dict[str, str]:
    return {pair[0]: pair[1] for pair in affinity if len(pair) == 2}


def _step(stage: StageRecord, run: Run) -> Any:
    takes = [value.name for value in stage.inputs]
    gives = [value.name for value in stage.outputs]

    def step(values: Values) -> Values:
        return {**values, **dict(zip(gives, run([values[name] for name in takes]), strict=True))}

    return step
