"""A small GPT on characters, on a parameter server: it learns to write like Python's help pages.

    python examples/char_transformer.py
    ps-run --servers 2 --workers 2 examples/char_transformer.py

The text is `pydoc_data.topics`, which ships with Python. Three lines differ from
`examples/plain/char_transformer.py`: the import, the loader, the optimizer.
"""

import argparse
import math
import pydoc_data.topics

import paramesh
import torch
from torch import nn


class Windows(torch.utils.data.Dataset):
    """Windows of `length` characters that follow each other; the target is one character on."""

    def __init__(self, codes, length):
        self.codes, self.length = codes, length

    def __len__(self):
        return (len(self.codes) - 1) // self.length

    def __getitem__(self, index):
        begin = index * self.length
        end = begin + self.length
        return self.codes[begin:end], self.codes[begin + 1 : end + 1]


class Block(nn.Module):
    """One pre-norm transformer block with causal self-attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Characters in (batch, time), scores of the next one out (batch, time, vocabulary)."""

    def __init__(self, vocabulary, length, width=64, heads=4, layers=2):
        super().__init__()
        self.length = length
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.characters.weight, std=0.1)
        self.head.weight = self.characters.weight  # tied, as GPT-2's are

    def forward(self, codes):
        x = self.characters(codes) + self.positions[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss_of(model, codes, targets):
    """Return the mean cross-entropy of the next character, in nats."""
    return nn.functional.cross_entropy(model(codes).flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits_per_character(model, windows):
    """Return the model's mean surprise over held-out windows, in bits."""
    codes, targets = zip(*(windows[i] for i in range(len(windows))), strict=True)
    return loss_of(model, torch.stack(codes), torch.stack(targets)).item() / math.log(2)


@torch.no_grad()
def write(model, prompt, characters, count, seed):
    """Return the prompt and `count` characters that the model drew after it."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.tensor([[characters.index(c) for c in prompt]])
    for _ in range(count):
        chances = torch.softmax(model(codes[:, -model.length :])[0, -1] / 0.7, dim=0)
        codes = torch.cat([codes, torch.multinomial(chances, 1, generator=generator)[None]], dim=1)
    return "".join(characters[i] for i in codes[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="characters of context")
    parser.add_argument("--characters", type=int, default=200_000, help="how much of the text to use")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))[: args.characters]
    characters = sorted(set(text))
    codes = torch.tensor([characters.index(c) for c in text])
    split = len(codes) * 19 // 20
    dataset, held_out = Windows(codes[:split], args.length), Windows(codes[split:], args.length)
    loader = paramesh.DataLoader(dataset, batch_size=args.batch_size, shuffle=True, seed=args.seed)
    model = GPT(len(characters), args.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    optimizer = paramesh.DistributedOptimizer(optimizer, model)

    before = bits_per_character(model, held_out)
    for epoch in range(args.epochs):
        total, count = 0.0, 0
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
            total, count = total + loss.item(), count + 1
        print(f"epoch {epoch + 1}/{args.epochs}: loss {total / max(count, 1):.3f} nats", flush=True)
    after = bits_per_character(model, held_out)
    print(f"held-out bits per character: {before:.2f} before, {after:.2f} after", flush=True)
    print(" ".join(write(model, 'The "', characters, 120, args.seed).split()), flush=True)


if __name__ == "__main__":
    main()
