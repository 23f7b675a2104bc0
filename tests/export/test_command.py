"""`lightning-hetero export`: from a checkpoint of a run over several devices to a chain that runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hetero.cli import main
from lightning_hetero.demos.digits import DigitsCNN, DigitsDataModule
from lightning_hetero.export import HeteroRuntime
from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy

CLASS = "module=lightning_hetero.demos.digits.DigitsCNN"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[DigitsCNN, Path]:
    """A trained model, and the folder with its checkpoint and its plan."""
    folder = tmp_path_factory.mktemp("run")
    strategy = HeteroStrategy(devices="cpu@speed=1,cpu@speed=1", placement="even", verbose=False)
    model = DigitsCNN(width=4)
    trainer = pl.Trainer(
        strategy=strategy,
        max_steps=3,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, DigitsDataModule())
    trainer.save_checkpoint(folder / "last.ckpt")
    shutil.copy(folder / "last.ckpt", folder / "epoch=0-step=3.ckpt")  # as Lightning calls them
    assert strategy.plan is not None
    (folder / "plan.json").write_text(strategy.plan.to_json())
    return model.eval(), folder


def test_a_checkpoint_of_a_run_over_several_devices_becomes_a_chain(
    run: tuple[DigitsCNN, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: Any
) -> None:
    model, folder = run
    where = f"directory={tmp_path / 'exported'}"
    words = [
        f"checkpoint={folder / 'epoch=0-step=3.ckpt'}",
        CLASS,
        where,
        f"plan={folder / 'plan.json'}",
        "inputs=2x1x8x8",
    ]
    code = main(["export", *words, "targets={stage0: openvino, *: torch:cpu}"])
    printed = capsys.readouterr()

    assert code == 0, printed.err
    first, second = printed.out.splitlines()
    assert first.startswith("stage0: emulated:0 -> openvino, ")
    assert second.startswith("stage1: emulated:1 -> torch:cpu, ")
    images = torch.rand(5, 1, 8, 8, generator=rng)
    with HeteroRuntime(tmp_path / "exported") as runtime:
        torch.testing.assert_close(runtime(images), model(images).detach(), rtol=0, atol=1e-5)


def test_a_plan_for_deployment_becomes_a_chain_for_its_devices(
    run: tuple[DigitsCNN, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: Any
) -> None:
    model, folder = run
    inventory = {
        "devices": [
            {"name": "cpu", "memory": "8GiB", "flops_per_s": {"float32": 1e9}, "measured": "data sheet"},
            {"name": "dla:0", "memory": "1GiB", "flops_per_s": {"float16": 5e12}, "measured": "data sheet"},
        ],
        "links": [
            {"source": "cpu", "target": "dla:0", "bandwidth": "12GB/s", "latency_s": 1e-5},
            {"source": "dla:0", "target": "cpu", "bandwidth": "12GB/s", "latency_s": 1e-5},
        ],
    }
    (tmp_path / "board.json").write_text(json.dumps(inventory))
    words = ["experiment=digits", "+model.width=4", "rows=3"]
    words += [f"devices.request={tmp_path / 'board.json'}", "placement=auto", "placement.objective=latency"]
    plan = ["plan", *words, "deployment=true", f"save={tmp_path / 'plan.json'}"]
    assert main(plan) == 0, capsys.readouterr().err
    refused = capsys.readouterr().out
    assert main([*plan, "convert_precision=true"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    words = [f"checkpoint={folder / 'last.ckpt'}", CLASS, f"directory={tmp_path / 'out'}", "inputs=3x1x8x8"]
    words += [f"plan={tmp_path / 'plan.json'}", "targets=auto", "dynamic_batch=false"]
    assert main(["export", *words]) == 0, capsys.readouterr().err

    assert "dla:0 takes no unit: it computes in float16, int8 and not in float32" in " ".join(refused.split())
    assert capsys.readouterr().out.startswith("stage0: dla:0 -> dla:0, ")
    images = torch.rand(3, 1, 8, 8, generator=rng)
    with HeteroRuntime(tmp_path / "out", {"stage0": "onnx"}) as runtime:
        torch.testing.assert_close(runtime(images), model(images).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing says what to export; add checkpoint=... module=... directory=..."),
        (["module=os.path.join"], "module=os.path.join: there is no such class ("),
        (["module=pathlib.Path"], "module=pathlib.Path is no LightningModule, and only such a class"),
        ([CLASS], "nobody knows what DigitsCNN is called with: it has no example_input_array. Add the sizes"),
        ([CLASS, "inputs=2x?"], "inputs=2x? is not the size of a tensor; write 2x1x8x8, or 2x16:int64"),
        ([CLASS, "inputs=2x1x8x8", "targets=onyx"], "unknown target 'onyx'. Did you mean 'onnx'?"),
        ([CLASS, "plan=x.json", "placement={*: cpu}"], "plan and placement both say where to cut"),
        ([CLASS, "checkpoint=nowhere.ckpt"], "checkpoint=nowhere.ckpt: there is no such file"),
        ([CLASS, "module=3"], "module=3 is not a text; write for example module=my_project.MyModel"),
        ([CLASS, f"checkpoint={__file__}"], f"checkpoint={__file__} does not open as a DigitsCNN: "),
        (
            ["module=lightning_hetero.demos.stdlib_lm.TinyGPT", "inputs=2x8:int64"],
            "checkpoint={checkpoint} does not open as a TinyGPT: ",
        ),
    ],
)
def test_what_does_not_work_is_said_without_a_traceback(
    run: tuple[DigitsCNN, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    checkpoint = run[1] / "last.ckpt"
    given = {"checkpoint": str(checkpoint), "directory": str(tmp_path / "out")} if words else {}
    given |= dict(word.split("=", 1) for word in words)
    code = main(["export", *(f"{key}={value}" for key, value in given.items())])
    error = capsys.readouterr().err

    assert code == 1
    assert error.startswith(f"lightning-hetero export: {message.format(checkpoint=checkpoint)}"), error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
