"""A Lightning project over every device of this machine, by one word: `strategy="hetero"`.

    python examples/01_five_lines.py
    HETERO_DEVICES=cuda:0,cpu HETERO_PLACEMENT=even python examples/01_five_lines.py

On a machine with nothing but a CPU, let it play several devices to see a split:
    HETERO_DEVICES="cpu@speed=1,cpu@speed=0.5" HETERO_PLACEMENT=even python examples/01_five_lines.py
"""

import lightning.pytorch as pl

from lightning_hetero.demos.digits import DigitsCNN, DigitsDataModule


def main() -> None:
    pl.seed_everything(1)
    trainer = pl.Trainer(strategy="hetero", max_epochs=4, log_every_n_steps=10)
    model, data = DigitsCNN(), DigitsDataModule()
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
