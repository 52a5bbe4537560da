"""Linear regression, one process: SGD on the mean squared error, beside the closed form.

    python examples/plain/linear_regression.py --epochs 20

`examples/linear_regression.py` is this file with three lines changed.
"""

import argparse

import torch
from torch import nn


def make_data(samples, features, noise, seed):
    """Return inputs (samples, features) and targets (samples, 1) = inputs @ weight + bias + noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, features, generator=generator)
    weight = torch.randn(features, 1, generator=generator)
    targets = inputs @ weight + 3.0 + noise * torch.randn(samples, 1, generator=generator)
    return inputs, targets


def closed_form(inputs, targets):
    """Return the least-squares (weight, bias), solved in double precision."""
    columns = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    solution = torch.linalg.lstsq(columns, targets.double()).solution.float()
    return solution[:-1].T, solution[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    inputs, targets = make_data(args.samples, args.features, args.noise, args.seed)
    dataset = torch.utils.data.TensorDataset(inputs, targets)
    loader = torch.utils.data.DataLoader(dataset, batch_size=args.batch_size, shuffle=True)
    model = nn.Linear(args.features, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.75)

    for _ in range(args.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        scheduler.step()

    weight, bias = closed_form(inputs, targets)
    with torch.no_grad():
        trained = nn.functional.mse_loss(model(inputs), targets).item()
        best = nn.functional.mse_loss(inputs @ weight.T + bias, targets).item()
        distance = max((model.weight - weight).abs().max().item(), (model.bias - bias).abs().max().item())
    print(f"trained     MSE {trained:.6f}  bias {model.bias.item():+.4f}", flush=True)
    print(f"closed form MSE {best:.6f}  bias {bias.item():+.4f}", flush=True)
    print(f"largest difference of a coefficient {distance:.1e}", flush=True)


if __name__ == "__main__":
    main()
