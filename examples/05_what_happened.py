"""What the devices did: a step drawn as text, a trace for Perfetto, and numbers for any logger of Lightning.

python examples/05_what_happened.py
python examples/05_what_happened.py --micro-batches 8
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger

from lightning_hetero import HeteroMonitor, HeteroStrategy
from lightning_hetero.demos.stdlib_lm import StdlibTextDataModule, TinyGPT
from lightning_hetero.schedule import chrome_trace, draw


class DrawOneStep(pl.Callback):
    """Records a step."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        """Begin."""
        if trainer.global_step == 5:  # the first steps try out how a batch can be cut
            self.block = trainer.strategy.recording()
            self.recording = self.block.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """End."""
        if trainer.global_step == 6:
            self.block.__exit__(None, None, None)
            print(draw(self.recording.timeline))
            trace = Path(trainer.default_root_dir, "step.json")
            trace.write_text(chrome_trace({"step 6": self.recording.timeline}))
            print(f"open {trace} in https://ui.perfetto.dev")


def main() -> None:
    parser = argparse.ArgumentParser(description="Look at a step.")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--folder", default="what_happened")
    options = parser.parse_args()

    pl.seed_everything(1)
    strategy = HeteroStrategy(
        devices="cpu@speed=1,cpu@speed=1", placement="even", micro_batches=options.micro_batches
    )  # on real hardware: devices="cuda:0,cuda:1"
    trainer = pl.Trainer(
        strategy=strategy,
        max_steps=10,
        log_every_n_steps=5,
        default_root_dir=options.folder,
        logger=CSVLogger(options.folder),
        callbacks=[DrawOneStep(), HeteroMonitor()],
    )
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    trainer.fit(TinyGPT(), StdlibTextDataModule())
    print(f"numbers: {trainer.logger.log_dir}/metrics.csv")


if __name__ == "__main__":
    main()
