"""Handwritten digits, one process: a small CNN on scikit-learn's bundled images.

    python examples/plain/digits.py --epochs 15

`examples/digits.py` is this file with three lines changed.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn


def load_data(seed):
    """Return (train images, train labels, test images, test labels), a fifth of them for the test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[len(order) // 5 :], order[: len(order) // 5]
    return images[train], labels[train], images[test], labels[test]


def make_model():
    """Return the network: 8x8 grey images in, ten scores out."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train_epoch(model, loader, optimizer):
    """Train on what the loader gives; return the mean loss (0 if it gave nothing)."""
    model.train()
    total, count = 0.0, 0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
        count += len(labels)
    return total / max(count, 1)


@torch.no_grad()
def accuracy(model, images, labels):
    """Return the share of images that the model names rightly."""
    model.eval()
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels, test_images, test_labels = load_data(args.seed)
    dataset = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=args.batch_size, shuffle=True)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    start = time.perf_counter()
    for epoch in range(args.epochs):
        loss = train_epoch(model, loader, optimizer)
        print(f"epoch {epoch + 1}/{args.epochs}: loss {loss:.4f}", flush=True)
    seconds = time.perf_counter() - start
    print(f"test accuracy {accuracy(model, test_images, test_labels):.2%} after {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
