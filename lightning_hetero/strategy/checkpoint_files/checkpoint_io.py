"""Reads and writes the checkpoints of a run; takes the place of Lightning's `TorchCheckpointIO`."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_hetero.errors import CheckpointError
from lightning_hetero.strategy.checkpoint_files.replacing import replacing
from lightning_hetero.strategy.checkpoint_files.seal import ZIP_BEGINS, BrokenSealError, is_sealed, save_sealed

if TYPE_CHECKING:
    from lightning.fabric.plugins import TorchCheckpointIO as _Base
else:
    _Base = object

log = logging.getLogger(__name__)

# How many other checkpoints an error message may take the time to read.
_OTHERS_TO_READ = 5


class CheckpointFilesCore(_Base):
    """Checkpoints of Lightning's format, written whole or not at all, with a sha256 that is verified on loading.

    The files open everywhere: they are what `torch.save` writes, with a comment at the end that `torch.load` passes
    over. On a local disk a new file takes the place of an old one in one step, once all of its bytes are on the disk.
    At other addresses that is as safe as the file system there makes it. Checkpoints without a sha256, those of plain
    Lightning, are loaded as Lightning loads them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint. When this returns, it is on the disk.

        Args:
            checkpoint: Of the Trainer.
            path: Or address, of a kind that fsspec knows.
            storage_options: None.

        Raises:
            CheckpointError: It cannot be written; a checkpoint that was there before stays as it is.
            TypeError: There are `storage_options`.
        """
        save = super().save_checkpoint
        if storage_options is not None or _is_replaced(save):  # in the first case Lightning says why not
            save(checkpoint, path, storage_options=storage_options)
            return
        file_system, place = url_to_fs(str(path))
        if not isinstance(file_system, LocalFileSystem):
            buffer = io.BytesIO()
            save_sealed(checkpoint, buffer)
            if folder := place.rpartition("/")[0]:
                file_system.makedirs(folder, exist_ok=True)
            with file_system.transaction:
                file_system.pipe_file(place, buffer.getvalue())
            return
        if Path(place).is_dir() and not Path(place).is_symlink():
            raise CheckpointError(
                f"checkpoint {place} cannot be written: a folder has that name, as checkpoints of strategies that "
                "write several files do. Remove it, or choose another name."
            )
        try:
            with replacing(Path(place)) as file:
                save_sealed(checkpoint, file)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {place} could not be written: {error.strerror or error}. Nothing of it remains, and a "
                "checkpoint of that name from before is as it was. Make room or give write access there, or choose "
                "another folder."
            ) from error

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Verify a checkpoint and read it.

        Args:
            path: Or address, of a kind that fsspec knows; with http(s), nothing is verified.
            arguments: As in Lightning.
            options: As in Lightning.

        Raises:
            CheckpointError: The file is damaged, or no checkpoint.
            FileNotFoundError: There is none.
        """
        file_system, place = url_to_fs(str(path))
        is_archive = True
        if not str(path).startswith("http") and file_system.exists(place):
            if file_system.isdir(place):
                raise CheckpointError(
                    f"checkpoint {path} is a folder, as strategies that write several files make them. Convert it into "
                    "one file first, for example with `python -m lightning.pytorch.utilities.consolidate_checkpoint`."
                )
            with file_system.open(place, "rb") as file:
                try:
                    if not is_sealed(file):
                        log.debug("checkpoint %s has no sha256, so nobody can say whether it is whole", path)
                except BrokenSealError as error:
                    raise CheckpointError(_damaged(path, error, Path(place), file_system)) from error
                file.seek(0)
                is_archive = file.read(len(ZIP_BEGINS)) == ZIP_BEGINS
        try:
            checkpoint = super().load_checkpoint(path, *arguments, **options)
        except FileNotFoundError:
            raise
        except Exception as error:
            if is_archive:  # what torch refuses to unpickle, say
                raise
            raise CheckpointError(
                f"checkpoint {path} cannot be read: it is no file that torch.save wrote, or its beginning has changed "
                f"({type(error).__name__}). Check the path."
            ) from error
        if not isinstance(checkpoint, dict):
            raise CheckpointError(
                f"checkpoint {path} holds a {type(checkpoint).__name__}, and that of a Trainer is a dict. Check the "
                "path; what torch.save wrote for other purposes is loaded with torch.load."
            )
        return checkpoint


def _is_replaced(method: Any) -> bool:
    """Whether user code has put another method in the place of that of Lightning's class, to change all saves."""
    return not str(getattr(method, "__module__", "")).endswith(".plugins.io.torch_io")


def _damaged(path: str | Path, error: BrokenSealError, place: Path, file_system: Any) -> str:
    other = whole_one_beside(place) if isinstance(file_system, LocalFileSystem) else None
    way_out = (
        "Take an older checkpoint, or a copy of this one."
        if other is None
        else f"The newest whole one in the same folder is {other}."
    )
    return f"checkpoint {path} is damaged: {error}. Nothing of it was loaded. {way_out}"


def whole_one_beside(path: Path) -> Path | None:
    """The newest other checkpoint in the same folder whose sha256 is right; None if a few that were read are not."""
    others = [other for other in path.parent.glob(f"*{path.suffix}") if other.is_file() and not other.is_symlink()]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    for other in [other for other in others if other.resolve() != path.resolve()][:_OTHERS_TO_READ]:
        try:
            with other.open("rb") as file:
                if is_sealed(file):
                    return other
        except (OSError, BrokenSealError):
            continue
    return None
