"""Train over three devices, take the model away, and run it as a chain of three runtimes.

pip install 'lightning-hetero[export,examples]'
python examples/07_export.py
python examples/07_export.py --targets torch:cpu
"""

import argparse
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_hetero import HeteroStrategy
from lightning_hetero.demos.digits import DigitsCNN, DigitsDataModule
from lightning_hetero.export import HeteroRuntime, export

RUNTIMES = ["onnx:CPUExecutionProvider", "openvino:CPU", "torch:cpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Export the digit reader to other runtimes.")
    parser.add_argument("--targets", nargs="+", default=RUNTIMES, help="targets of the stages, in turns")
    options = parser.parse_args()

    pl.seed_everything(1)
    model, data = DigitsCNN(), DigitsDataModule()
    strategy = HeteroStrategy(devices="cpu@speed=1,cpu@speed=1,cpu@speed=1", placement="even")
    pl.Trainer(strategy=strategy, max_epochs=2, logger=False, enable_checkpointing=False).fit(model, data)

    places = dict.fromkeys(stage.device for stage in strategy.plan.stages)
    targets = {place: options.targets[index % len(options.targets)] for index, place in enumerate(places)}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "exported"
        example = torch.rand(2, 1, 8, 8)  # the batch stays open
        manifest = export(model, where, example_inputs=example, placement=strategy.plan, targets=targets)
        for stage in manifest.stages:
            print(f"{stage.name}: {stage.source_device} -> {stage.target}: {', '.join(stage.units)}")
        with HeteroRuntime(where) as chain, torch.no_grad():
            compare(model.eval(), chain, data)


def compare(model: DigitsCNN, chain: HeteroRuntime, data: DigitsDataModule) -> None:
    difference, hits, wanted_hits, rows = 0.0, 0, 0, 0
    for images, labels in data.test_dataloader():
        found, wanted = chain(images), model(images)
        difference = max(difference, float((found - wanted).abs().max()))
        hits += int((found.argmax(1) == labels).sum())
        wanted_hits += int((wanted.argmax(1) == labels).sum())
        rows += len(labels)
    print(f"largest difference {difference:.1e}")
    print(f"accuracy {hits / rows:.4f}, of the model itself {wanted_hits / rows:.4f}")


if __name__ == "__main__":
    main()
