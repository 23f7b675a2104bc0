"""A plain PyTorch loop, no Lightning: the model is wrapped, everything else stays as it was.

    python examples/02_plain_pytorch.py
    python examples/02_plain_pytorch.py --epochs 10 --torchscript

Uses every accelerator and the CPU. Where there is no accelerator, the CPU plays two devices.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hetero import ModelParallel, ModelParallelConfig


def dataset() -> list[torch.utils.data.Subset]:
    """Step 1: images (rows, 1, 8, 8) and labels (rows,), four of five to train."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    everything = TensorDataset(images, torch.tensor(digits.target))
    return random_split(everything, [0.8, 0.2], generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    """Step 2: any module."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def train(model: nn.Module, batches: DataLoader, epochs: int) -> None:
    """Step 4: Adam and cross entropy, as ever."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels.to(logits.device))
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch} loss {loss.item():.4f}")


def accuracy(model: nn.Module, batches: DataLoader) -> float:
    """Step 5: the share of images that are read correctly."""
    model.eval()
    with torch.no_grad():
        hits = [(model(images).argmax(1).cpu() == labels).sum().item() for images, labels in batches]
    return sum(hits) / len(batches.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a digit reader over several devices, without Lightning.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--torchscript", action="store_true", help="compile each stage with TorchScript")
    options = parser.parse_args()
    torch.manual_seed(1)
    train_set, test_set = dataset()
    accelerators = [*range(torch.accelerator.device_count())]
    config = ModelParallelConfig(  # step 3: which model, over which devices
        model=network(),
        device_ids=[*accelerators, "cpu"] if accelerators else [0, 1],
        backend="auto" if accelerators else "cpu",
        torchscript=options.torchscript,
    )
    with ModelParallel(config) as model:
        for stage in model.plan.stages:
            print(f"{stage.device}: {', '.join(stage.units)}")
        train(model, DataLoader(train_set, batch_size=64, shuffle=True), options.epochs)
        print(f"accuracy {accuracy(model, DataLoader(test_set, batch_size=256)):.4f}")


if __name__ == "__main__":
    main()
