"""A GAN on eight Gaussians in the plane, on a parameter server: two networks, two optimizers.

    python examples/gan.py
    ps-run --servers 2 --workers 2 examples/gan.py

Three lines differ from `examples/plain/gan.py`: the import, the loader, and the one place that
makes both optimizers. Every worker seeds torch alike and so draws the same noise, for other
real points; `torch.manual_seed(seed + paramesh.rank())` would make the noise differ too.
"""

import argparse
import math

import paramesh
import torch
from torch import nn

MODES, RADIUS, SPREAD = 8, 2.0, 0.1


def centres():
    """Return the eight centres, evenly around a circle: (8, 2)."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def make_points(count, seed):
    """Return `count` points (count, 2), each near one of the centres."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(MODES, (count,), generator=generator)
    return centres()[which] + SPREAD * torch.randn(count, 2, generator=generator)


def make_network(inputs, outputs, width=96):
    """Return a perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )


def make_optimizer(network, lr):
    """Return the optimizer of one of the two networks."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.9))
    return paramesh.DistributedOptimizer(optimizer, network)


def discriminator_loss(discriminator, real, fake):
    """Return the loss that is low where real points score high and made ones low."""
    return nn.functional.softplus(-discriminator(real)).mean() + nn.functional.softplus(discriminator(fake)).mean()


@torch.no_grad()
def judge(generator, noise_size, seed):
    """Return (centres that at least 2 % of the made points are near, share of points near one)."""
    noise = torch.randn(4000, noise_size, generator=torch.Generator().manual_seed(seed))
    distance, nearest = torch.cdist(generator(noise), centres()).min(dim=1)
    near = distance < 4 * SPREAD
    shares = torch.bincount(nearest[near], minlength=MODES) / len(noise)
    return int((shares >= 0.02).sum()), near.float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--points", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--noise-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    dataset = torch.utils.data.TensorDataset(make_points(args.points, args.seed))
    loader = paramesh.DataLoader(dataset, batch_size=args.batch_size, shuffle=True, seed=args.seed)
    generator, discriminator = make_network(args.noise_size, 2), make_network(2, 1)
    generator_optimizer = make_optimizer(generator, args.lr)
    discriminator_optimizer = make_optimizer(discriminator, args.lr)

    for epoch in range(args.epochs):
        for (real,) in loader:
            fake = generator(torch.randn(len(real), args.noise_size))
            discriminator_optimizer.zero_grad()
            discriminator_loss(discriminator, real, fake.detach()).backward()
            discriminator_optimizer.step()

            generator_optimizer.zero_grad()
            nn.functional.softplus(-discriminator(fake)).mean().backward()
            generator_optimizer.step()
        if (epoch + 1) % 10 == 0:
            found, share = judge(generator, args.noise_size, args.seed)
            print(f"epoch {epoch + 1}/{args.epochs}: {found} of {MODES} modes, {share:.0%} near one", flush=True)
    found, share = judge(generator, args.noise_size, args.seed)
    print(f"the generator found {found} of {MODES} modes; {share:.0%} of its points are near one", flush=True)


if __name__ == "__main__":
    main()
