"""The sum against a slow scalar reference, bit for bit (protocol, section 10 ii; invariant 15)."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paramesh.routing import PartitionLayout, cut
from paramesh_server.aggregate import BLOCK, Gradient, Part, Reduction, Workspace, squared_norm, sum_parts
from ps_building import DTYPES, contribution, random_gradients, raw, reference_sum, table

CLIP = float(numpy.float32(0.3))
"""A factor as the record carries it: a float32."""

WIDE = {"fp32": numpy.float32, "fp64": numpy.float64, "fp16": numpy.float32, "bf16": numpy.float32}


def as_numpy(tensor: torch.Tensor, wide: type[numpy.floating]) -> numpy.ndarray:
    """Widening a half is exact, so the reference may start from the wide form."""
    return tensor.to(torch.float64).numpy().astype(wide)


def summed(
    layout: PartitionLayout,
    gradients: list[list[torch.Tensor | None]],
    weights: list[float],
    *,
    mean: bool,
    clip: float | None = None,
    frame_bytes: list[int] | None = None,
) -> tuple[Gradient, list[bool]]:
    cuts = frame_bytes or [0] * len(gradients)
    parts = [
        Part(contribution(layout, g, size), w if mean else None)
        for g, w, size in zip(gradients, weights, cuts, strict=True)
    ]
    total = sum(weights) if mean else None
    out = Gradient(layout)
    return out, sum_parts(layout, parts, Reduction(total, clip), out)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("mean", "clip"), list(itertools.product([True, False], [None, CLIP])))
def test_every_dtype_and_reduction_equals_the_reference(name: str, mean: bool, clip: float | None) -> None:
    layout = cut(table([130, 64, 1], dtype=DTYPES[name]))[0]
    weights = [3.0, 0.7, 1.0, 12.0]
    gradients: list[list[torch.Tensor | None]] = [list(random_gradients(layout, seed)) for seed in range(4)]
    gradients[0][0] = gradients[2][0] = None  # absent on some
    for one in gradients:
        one[2] = None  # absent everywhere
    out, anywhere = summed(layout, gradients, weights, mean=mean, clip=clip, frame_bytes=[0, 64, 128, 192])
    assert anywhere == [True, True, False]
    for index in (0, 1):
        columns = [None if g[index] is None else as_numpy(g[index], WIDE[name]) for g in gradients]
        wanted = reference_sum(columns, weights, mean=mean, clip=clip, wide=WIDE[name])
        rounded = torch.from_numpy(wanted).to(out.views[index].dtype)
        assert raw(out.views[index]) == raw(rounded)


def test_halves_are_rounded_once_at_the_end() -> None:
    """Rounding each product to bfloat16 would give another answer: this input shows it."""
    layout = cut(table([64], dtype=DTYPES["bf16"]))[0]
    gradients: list[list[torch.Tensor | None]] = [list(random_gradients(layout, s)) for s in range(3)]
    out, _ = summed(layout, gradients, [1.3, 0.9, 2.1], mean=True)
    rounded_each_time = sum((g[0] * w for g, w in zip(gradients, [1.3, 0.9, 2.1], strict=True))) / 4.3
    assert raw(out.views[0]) != raw(rounded_each_time)


def test_no_fma() -> None:
    """`add(alpha=)` multiplies and adds with one rounding: this input shows the difference."""
    layout = cut(table([4096]))[0]
    a, b = random_gradients(layout, 1), random_gradients(layout, 2)
    out, _ = summed(layout, [list(a), list(b)], [0.1, 0.3], mean=True)
    with_fma = (a[0] * 0.1).add(b[0], alpha=0.3) / (0.1 + 0.3)
    without = (a[0] * 0.1 + b[0] * 0.3) / (0.1 + 0.3)
    assert raw(out.views[0]) == raw(without)
    assert raw(out.views[0]) != raw(with_fma)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 64, 192, 4096, BLOCK * 4 + 64]), min_size=2, max_size=3), st.booleans())
def test_neither_frames_nor_blocks_change_a_bit(sizes: list[int], mean: bool) -> None:
    """Invariant 15: how a contribution was cut for the wire is not seen in the result."""
    layout = cut(table([BLOCK + 100, 70]))[0]
    gradients: list[list[torch.Tensor | None]] = [list(random_gradients(layout, s)) for s in range(len(sizes))]
    weights = [0.37, 1.9, 2.3][: len(sizes)]
    whole, _ = summed(layout, gradients, weights, mean=mean)
    framed, _ = summed(layout, gradients, weights, mean=mean, frame_bytes=sizes)
    for a, b in zip(whole.views, framed.views, strict=True):
        assert raw(a) == raw(b)


def test_rank_order_decides_not_the_values() -> None:
    layout = cut(table([512]))[0]
    a, b, c = (list(random_gradients(layout, s, scale=10.0**s)) for s in (1, 5, 9))
    first, _ = summed(layout, [a, b, c], [1.0, 1.0, 1.0], mean=True)
    other, _ = summed(layout, [c, b, a], [1.0, 1.0, 1.0], mean=True)
    assert raw(first.views[0]) != raw(other.views[0])


def test_the_divisor_counts_those_who_lack_the_segment() -> None:
    layout = cut(table([64]))[0]
    ones: list[torch.Tensor | None] = [torch.ones(64)]
    out, _ = summed(layout, [ones, [None]], [1.0, 3.0], mean=True)
    assert torch.equal(out.views[0], torch.full((64,), 0.25))


@pytest.mark.parametrize("name", DTYPES)
def test_squared_norms_add_up_in_fp64(name: str) -> None:
    layout = cut(table([BLOCK + 10, 64], dtype=DTYPES[name]))[0]
    gradients: list[list[torch.Tensor | None]] = [list(random_gradients(layout, s)) for s in range(2)]
    parts = [Part(contribution(layout, g), w) for g, w in zip(gradients, (1.0, 2.0), strict=True)]
    like = Gradient(layout).views
    value = squared_norm(layout, parts, Reduction(3.0, clip=0.5), like)
    wide = [
        (gradients[0][i].double() * 1.0 + gradients[1][i].double() * 2.0) / 3.0  # type: ignore[union-attr]
        for i in range(2)
    ]
    assert value == pytest.approx(float(sum((w * w).sum() for w in wide)), rel=1e-5)
    assert value == squared_norm(layout, parts, Reduction(3.0, None), like)


def test_special_values_pass_through() -> None:
    """Bad-input row 12: denormals and -0.0 keep their bits; NaN and inf are the table's affair."""
    special = torch.tensor([-0.0, 1e-40, float("inf"), float("nan"), -1e38, *([0.0] * 59)])
    layout = cut(table([64]))[0]
    out, _ = summed(layout, [[special]], [1.0], mean=True)
    assert raw(out.views[0]) == raw(special)


def test_gradient_memory_is_used_again() -> None:
    """One buffer per sum at the same time, however many partitions there are."""
    small, large = cut(table([64]))[0], cut(table([640]))[0]
    workspace = Workspace()
    with workspace.borrow(large) as one, workspace.borrow(small) as two:
        assert one.flat.data_ptr() != two.flat.data_ptr()
        used = {one.flat.data_ptr(), two.flat.data_ptr()}
    with workspace.borrow(small) as one, workspace.borrow(small) as two:
        assert {one.flat.data_ptr(), two.flat.data_ptr()} == used
        assert [len(view) for view in one.views] == [64]
