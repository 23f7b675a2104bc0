"""Placement by hand, under memory limits, on two devices that the CPU plays.

python examples/03_device_map.py
python examples/03_device_map.py --small 1MiB      # too small: see what the error says
python examples/03_device_map.py --steps 300       # long enough to learn something
"""

import argparse

import lightning.pytorch as pl

from lightning_hetero import HeteroStrategy, InfeasiblePlanError
from lightning_hetero.demos.stdlib_lm import StdlibTextDataModule, TinyGPT


def main() -> None:
    parser = argparse.ArgumentParser(description="Place a small GPT by hand.")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--small", default="8MiB", help="memory of the small device")
    options = parser.parse_args()

    strategy = HeteroStrategy(
        # On real hardware: devices=["cuda:0", "cuda:1"].
        devices=["cpu@speed=1,mem=64MiB,name=large", "cpu@speed=0.5,mem=8MiB,name=small"],
        memory={"small": options.small},
        # Names of modules, as in Hugging Face's device_map; the longest one that fits wins, "" is the rest.
        placement={"blocks.2": "small", "norm": "small", "": "large"},
    )
    pl.seed_everything(1)
    trainer = pl.Trainer(
        strategy=strategy,
        max_steps=options.steps,
        limit_test_batches=4,
        logger=False,
        enable_checkpointing=False,
    )
    model, data = TinyGPT(), StdlibTextDataModule()
    try:
        trainer.fit(model, data)
    except InfeasiblePlanError as error:
        raise SystemExit(f"The map does not fit:\n{error}") from None
    trainer.test(model, data)
    for stage in strategy.plan.stages:
        print(f"{stage.device}: {', '.join(stage.units)}")


if __name__ == "__main__":
    main()
