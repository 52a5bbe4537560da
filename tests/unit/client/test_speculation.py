"""Pushing during backward: what leaves when, and that nothing wrong survives step()."""

import concurrent.futures
import logging

import pytest
import torch
from paramesh.encoded import Encoded
from paramesh.errors import refuse
from paramesh.speculation import Speculation, Staged, same_bytes
from paramesh.tensors import HostCopies, TablePlan
from paramesh.v1 import parameter_server_pb2, types_pb2


class Bench:
    """A model whose pushes are recorded instead of sent."""

    def __init__(self, sizes=(64, 64, 200, 1), partition_bytes=512):
        self.parameters = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
        spec = types_pb2.OptimizerSpec(class_name="SGD")
        named = [(f"p{i}", p) for i, p in enumerate(self.parameters)]
        self.plan = TablePlan("t", "g", named, spec, partition_bytes)
        self.plan.place(1, 1)
        self.pushed = []
        self.ready = True
        self.refuses = False
        self.speculation = Speculation([self.plan], self.push, lambda: self.ready)
        self.speculation.watch()

    def push(self, partition, encoded):
        if self.refuses:
            raise refuse("PARTITION_OFFLINE", "gone")
        encoded.messages(parameter_server_pb2.PushHeader(partition=partition))
        self.pushed.append(partition)
        return Staged(encoded, 1, concurrent.futures.Future())

    def backward(self, value=1.0, absent=()):
        loss = sum((p * value).sum() for i, p in enumerate(self.parameters) if i not in absent)
        loss.backward()

    def settle(self):
        """partition -> whether what was pushed still holds; as step() does."""
        flats = HostCopies().flats([p.grad for p in self.parameters])
        held = {}
        for partition in self.plan.partitions:
            staged = self.speculation.settle(partition, *self.plan.gather(partition, flats))
            held[partition] = staged is not None
        self.speculation.next_step()
        self.pushed.clear()
        for p in self.parameters:
            p.grad = None
        return held

    def observe(self):
        for _ in range(2):
            self.backward()
            assert self.pushed == []
            assert not any(self.settle().values())


def test_two_steps_observe_then_every_partition_leaves_during_backward():
    bench = Bench()
    bench.observe()
    bench.backward(3.0)
    assert sorted(bench.pushed) == list(bench.plan.partitions)
    assert all(bench.settle().values())


@pytest.mark.parametrize(
    "edit",
    [
        lambda p: p.grad.mul_(0.5),
        lambda p: p.grad.data.mul_(0.5),
        lambda p: setattr(p, "grad", p.grad * 2),
        lambda p: setattr(p, "grad", None),
        lambda p: p.grad.view(-1)[-1].add_(1e-6),
    ],
    ids=["in place", "through data", "replaced", "removed", "one bit of one element"],
)
def test_what_was_edited_after_backward_is_sent_again_and_only_that(edit):
    bench = Bench()
    bench.observe()
    bench.backward()
    edit(bench.parameters[0])
    held = bench.settle()
    touched = set(bench.plan.partitions_by_parameter()[0])
    assert held == {partition: partition not in touched for partition in bench.plan.partitions}


def test_two_mistaken_steps_end_it_with_one_line(caplog):
    bench = Bench()
    bench.observe()
    with caplog.at_level(logging.INFO, logger="paramesh.speculation"):
        for _ in range(4):
            bench.backward()
            bench.parameters[0].grad.mul_(0.5)
            bench.settle()
    assert caplog.text.count("speculation=off") == 1
    bench.backward()
    assert bench.pushed == []


def test_accumulation_waits_for_the_last_backward_of_the_habit():
    bench = Bench()
    for _ in range(2):
        bench.backward()
        bench.backward()
        bench.settle()
    bench.backward()
    assert bench.pushed == []
    bench.backward()
    assert sorted(bench.pushed) == list(bench.plan.partitions)
    assert all(bench.settle().values())


def test_a_backward_beyond_the_habit_is_noticed():
    bench = Bench()
    bench.observe()
    bench.backward()
    bench.backward()
    assert not any(bench.settle().values())


def test_no_sync_counts_and_pushes_nothing():
    bench = Bench()
    bench.observe()
    bench.speculation.paused = True
    bench.backward()
    bench.speculation.paused = False
    assert bench.pushed == []


def test_a_missing_gradient_holds_back_its_partitions_and_resets_the_habit():
    bench = Bench()
    bench.observe()
    bench.backward(absent=(2,))
    holders = set(bench.plan.partitions_by_parameter()[2])
    assert set(bench.pushed) == set(bench.plan.partitions) - holders
    bench.settle()
    bench.backward()
    assert bench.pushed == []  # the counts changed: observe again


def test_nothing_leaves_before_parameters_are_those_of_a_step_nor_after_they_were_replaced():
    bench = Bench()
    bench.observe()
    bench.ready = False
    bench.backward()
    assert bench.pushed == []
    bench.settle()
    bench.ready = True
    bench.backward()
    assert bench.pushed
    bench.speculation.discard()
    assert bench.speculation.settle(1, b"", []) is None


def test_an_error_while_pushing_does_not_reach_backward():
    bench = Bench()
    bench.observe()
    bench.refuses = True
    bench.backward()
    assert not any(bench.settle().values())


def test_same_bytes_compares_memory_across_frames():
    gradient = torch.arange(300, dtype=torch.float32)
    view = memoryview(gradient.numpy()).cast("B")
    encoded = Encoded.from_parts(1, b"", [(0, view)], frame_bytes=256)
    encoded.messages(parameter_server_pb2.PushHeader(partition=1))
    assert same_bytes(encoded, [(0, view)])
    for index in (0, 63, 64, 299):
        other = gradient.clone()
        other[index] += 1
        assert not same_bytes(encoded, [(0, memoryview(other.numpy()).cast("B"))]), index
    assert not same_bytes(encoded, [(64, view)])
    zero, minus = torch.zeros(4), -torch.zeros(4)
    encoded = Encoded.from_parts(1, b"", [(0, memoryview(zero.numpy()).cast("B"))])
    encoded.messages(parameter_server_pb2.PushHeader(partition=1))
    assert not same_bytes(encoded, [(0, memoryview(minus.numpy()).cast("B"))])
    nan = torch.full((4,), float("nan"))
    encoded = Encoded.from_parts(1, b"", [(0, memoryview(nan.numpy()).cast("B"))])
    encoded.messages(parameter_server_pb2.PushHeader(partition=1))
    assert same_bytes(encoded, [(0, memoryview(nan.numpy()).cast("B"))])
