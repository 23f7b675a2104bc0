"""`lightning-hetero export`: a checkpoint as a chain of stages for other runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from lightning_hetero.cli.application import run_application
from lightning_hetero.errors import UsageError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from omegaconf import DictConfig
    from torch import Tensor

    from lightning_hetero.export import Manifest

_REQUIRED = ("checkpoint", "module", "directory")
_TEXTS = {"checkpoint": "last.ckpt", "module": "my_project.MyModel", "directory": "exported", "plan": "plan.json"}
_PATHS = ("checkpoint", "directory", "plan")


def main(argv: Sequence[str]) -> int:
    """Export as the arguments say: `checkpoint=last.ckpt module=my_project.MyModel directory=exported`, `--help`.

    Returns:
        0; 1 after a failure that was explained on stderr.
    """
    return run_application("export", export_checkpoint, [_quoted(word) for word in argv])


def export_checkpoint(cfg: DictConfig) -> None:
    """Load a checkpoint, export the model, and print its stages.

    Args:
        cfg: The configuration `export`, composed by Hydra.

    Raises:
        HeteroError: A key has no value or one that makes no sense, or the model cannot be exported like that.
    """
    from omegaconf import OmegaConf

    from lightning_hetero.cli.output import text_of
    from lightning_hetero.export import export
    from lightning_hetero.strategy.planning import read_plan

    missing = [f"{key}=..." for key in _REQUIRED if OmegaConf.is_missing(cfg, key)]
    if missing:
        raise UsageError(f"nothing says what to export; add {' '.join(missing)}")
    if cfg.plan is not None and cfg.placement is not None:
        raise UsageError("plan and placement both say where to cut; leave one of them out")
    keys: Any = OmegaConf.to_container(cfg, resolve=True)
    for key, example in _TEXTS.items():
        text_of(key, keys[key], example)
    model = _load(keys["module"], Path(keys["checkpoint"]))
    manifest = export(
        model,
        keys["directory"],
        example_inputs=_example(model, keys["inputs"]),
        targets=keys["targets"],
        placement=read_plan(Path(keys["plan"])) if keys["plan"] is not None else keys["placement"],
        affinity=keys["affinity"],
        dynamic_batch=keys["dynamic_batch"],
        overwrite=keys["overwrite"],
    )
    print(summary(manifest))


def _quoted(word: str) -> str:
    """A path with an equals sign in quotes, or Hydra would read it as its own: Lightning's "epoch=1-step=40.ckpt"."""
    key, _, value = word.partition("=")
    return f"{key}='{value}'" if key in _PATHS and "=" in value and value[0] not in "'\"" else word


def summary(manifest: Manifest) -> str:
    """One line for each stage: where it was, where it will run, and how large it is."""
    from lightning_hetero.units import format_bytes

    lines = []
    for stage in manifest.stages:
        size = format_bytes(sum(file.bytes for file in stage.files))
        lines.append(f"{stage.name}: {stage.source_device} -> {stage.target}, {len(stage.units)} units, {size}")
    return "\n".join(lines)


def _load(name: str, checkpoint: Path) -> LightningModule:
    from hydra.utils import get_class
    from lightning.pytorch import LightningModule

    try:
        kind: Any = get_class(name)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"module={name}: there is no such class ({error}). Write it as package.module.Class."
        ) from error
    if not issubclass(kind, LightningModule):
        raise UsageError(f"module={name} is no LightningModule, and only such a class knows how to read a checkpoint")
    if not checkpoint.is_file():
        raise UsageError(f"checkpoint={checkpoint}: there is no such file")
    try:
        model: LightningModule = kind.load_from_checkpoint(checkpoint, map_location="cpu")
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError, EOFError, OSError, UnpicklingError) as error:
        raise UsageError(
            f"checkpoint={checkpoint} does not open as a {kind.__name__}: {_why(error)}. "
            "It has to be a checkpoint of that class, which calls self.save_hyperparameters() if it has arguments."
        ) from error
    return model


def _why(error: Exception) -> str:
    """What torch says, without its advice to read files that may run code."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return text.strip().partition("\n\nCheck the doc")[0].strip().rstrip(".") or type(error).__name__


def _example(model: LightningModule, inputs: str | list[str] | None) -> Any:
    if inputs is not None:
        return tuple(map(_tensor, [inputs] if isinstance(inputs, str) else inputs))
    example = model.example_input_array
    if example is None:
        raise UsageError(
            f"nobody knows what {type(model).__name__} is called with: it has no example_input_array. "
            "Add the sizes of its arguments, inputs=2x1x8x8 or inputs=2x16:int64, with at least 2 rows."
        )
    return example


def _tensor(words: str) -> Tensor:
    """A tensor for "2x16:int64": zeros if they are integers, random numbers if not."""
    import torch

    sizes, _, dtype_name = str(words).partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    numbers = sizes.split("x")
    if not isinstance(dtype, torch.dtype) or not all(number.isdigit() for number in numbers):
        raise UsageError(
            f"inputs={words} is not the size of a tensor; write 2x1x8x8, or 2x16:int64 with a dtype of torch"
        )
    shape = [int(number) for number in numbers]
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
