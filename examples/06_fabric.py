"""A loop of your own with Lightning Fabric, over every device of this machine, by one word: `strategy="hetero"`.

    python examples/06_fabric.py
    HETERO_DEVICES="cpu@speed=1,cpu@speed=1" HETERO_PLACEMENT=even python examples/06_fabric.py

The second line lets the CPU play two devices, to see a split where there is no accelerator.
"""

import argparse

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_hetero  # noqa: F401  (needed only where torch does not load plugins by itself)


def batches() -> tuple[DataLoader, DataLoader]:
    """Images (rows, 64) and labels (rows,), four of five to train."""
    digits = load_digits()
    everything = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train_set, test_set = random_split(everything, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    return DataLoader(train_set, batch_size=64, shuffle=True), DataLoader(test_set, batch_size=256)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a digit reader with Fabric over several devices.")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()

    fabric = Fabric(strategy="hetero")
    fabric.launch()
    fabric.seed_everything(1, verbose=False)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=2e-3))  # plans, and places
    train_batches, test_batches = fabric.setup_dataloaders(*batches())

    for epoch in range(options.epochs):
        for images, labels in train_batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
        fabric.print(f"epoch {epoch} loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        hits = sum((model(images).argmax(1) == labels).sum().item() for images, labels in test_batches)
    fabric.print(f"accuracy {hits / len(test_batches.dataset):.4f}")


if __name__ == "__main__":
    main()
