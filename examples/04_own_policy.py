"""A placement policy of your own: the first device takes what fits into a part of its memory, and so on.

python examples/04_own_policy.py
python examples/04_own_policy.py --full 0.9      # fill the first device further
"""

import argparse
from dataclasses import dataclass

import lightning.pytorch as pl

from lightning_hetero import HeteroStrategy, register_policy
from lightning_hetero.demos.stdlib_lm import StdlibTextDataModule, TinyGPT
from lightning_hetero.placement import Placement, Problem


@register_policy("first_fit")  # from now on `placement="first_fit"` means it, and so does the command line's
@dataclass(frozen=True)
class FirstFit:
    """Fills one device after the other, each to a part of its memory."""

    full: float = 0.5
    name: str = "first_fit"

    def place(self, problem: Problem) -> Placement:
        """Answer with a device for every unit."""
        devices = list(problem.inventory.trainable)
        device_of, left_bytes = {}, self.full * devices[0].memory_bytes
        for group in problem.graph.groups:  # units that have to stay together, in the order of their calls
            need_bytes = sum(unit.parameter_bytes for unit in group) * (2 + problem.optimizer_factor)
            while need_bytes > left_bytes and len(devices) > 1:
                devices.pop(0)
                left_bytes = self.full * devices[0].memory_bytes
            left_bytes -= need_bytes
            device_of.update({unit.name: devices[0].name for unit in group})
        return Placement(
            device_of=device_of, notes=(f"Each device is filled to {self.full:.0%}, one after the other.",)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Place a small GPT by a policy of one's own.")
    parser.add_argument("--full", type=float, default=0.5)
    options = parser.parse_args()

    pl.seed_everything(1)
    # On real hardware: devices=["cuda:0", "cuda:1", "cpu"].
    devices = ["cpu@speed=1,mem=8MiB,name=near", "cpu@speed=1,mem=64MiB,name=far"]
    strategy = HeteroStrategy(devices=devices, placement=FirstFit(options.full))
    trainer = pl.Trainer(strategy=strategy, max_steps=10, logger=False, enable_checkpointing=False)
    trainer.fit(TinyGPT(), StdlibTextDataModule())
    for stage in strategy.plan.stages:
        print(f"{stage.device}: {', '.join(stage.units)}")


if __name__ == "__main__":
    main()
