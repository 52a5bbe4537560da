"""Parameters to partitions and back: bytes equal whatever dtype, memory format or cut."""

import numpy as np
import pytest
import torch
from paramesh.edits import Edits, partition_bytes
from paramesh.encoded import Encoded
from paramesh.errors import ParameshError, ParametersChanged
from paramesh.framing import checksum
from paramesh.tensors import DTYPES, HostCopies, Scatter, TablePlan, flat_bytes, named_parameters, wire_name
from paramesh.v1 import types_pb2

SGD = types_pb2.OptimizerSpec(class_name="SGD")


def plan_of(*tensors, partition_bytes=1024, first=7):
    plan = TablePlan("t", "g", [(f"p{i}", t) for i, t in enumerate(tensors)], SGD, partition_bytes)
    plan.place(1, first)
    return plan


def filled(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype in (torch.complex128, torch.float64) else torch.float32
    value = torch.randn(shape, generator=generator, dtype=real)
    if dtype.is_complex:
        value = torch.complex(value, torch.randn(shape, generator=generator, dtype=real))
    return value.to(dtype)


def transfer(plan, sources):
    """Sends tensors through frames into the plan's parameters."""
    scatter = Scatter([plan])
    scatter.prepare()
    flats = HostCopies().flats(sources)
    for partition in plan.partitions:
        presence, parts = plan.gather(partition, flats)
        encoded = Encoded.from_parts(partition, presence, parts, frame_bytes=256)
        for offset, _, buffers in encoded.frames():
            scatter.write(partition, offset, memoryview(b"".join(buffers)))
    scatter.finish()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (65,), (3, 5, 7), (40, 50)], ids=str)
def test_round_trip_is_exact(dtype, shape):
    target = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    other = torch.nn.Parameter(torch.zeros(11, dtype=torch.float32))
    source = [filled(shape, dtype), filled((11,), torch.float32, 1)]
    plan = plan_of(target, other)
    transfer(plan, source)
    assert torch.equal(target.detach(), source[0])
    assert torch.equal(other.detach(), source[1])


def layouts_of(value):
    """The same logical 4-d values in other memory layouts."""
    yield "contiguous", value.clone()
    yield "channels_last", value.clone().to(memory_format=torch.channels_last)
    yield "transposed", value.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.zeros(value.shape[0], value.shape[1], value.shape[2], value.shape[3] * 2, dtype=value.dtype)
    padded[..., ::2] = value
    yield "strided", padded[..., ::2]


@pytest.mark.parametrize("sent", range(4))
@pytest.mark.parametrize("received", range(4))
def test_the_wire_is_row_major_whatever_the_memory_format(sent, received):
    value = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    source = list(layouts_of(value))[sent][1]
    target = torch.nn.Parameter(torch.zeros_like(list(layouts_of(value))[received][1]).copy_(value * 0))
    name, holder = list(layouts_of(torch.zeros_like(value)))[received]
    target = torch.nn.Parameter(holder)
    assert target.stride() == holder.stride(), name
    transfer(plan_of(target, partition_bytes=512), [source])
    assert torch.equal(target.detach(), value)
    assert target.stride() == holder.stride()


def test_a_contiguous_gradient_is_not_copied_and_a_conjugate_is_resolved():
    gradient = torch.randn(8)
    assert np.shares_memory(flat_bytes(gradient), gradient.numpy())
    conjugate = torch.tensor([1 + 2j]).conj()
    assert flat_bytes(conjugate).tobytes() == torch.tensor([1.0, -2.0]).numpy().tobytes()


def test_contiguous_parameters_are_written_in_place_and_autograd_is_told():
    target = torch.nn.Parameter(torch.zeros(100))
    pointer, version = target.data_ptr(), target._version
    transfer(plan_of(target), [torch.ones(100)])
    assert target.data_ptr() == pointer
    assert target._version > version
    assert float(target.detach().sum()) == 100


def test_parameters_that_moved_are_found_again():
    target = torch.nn.Parameter(torch.zeros(100))
    plan = plan_of(target)
    scatter = Scatter([plan])
    for number in (1.0, 2.0):
        target.data = torch.zeros(100)
        scatter.prepare()
        _, parts = plan.gather(7, [flat_bytes(torch.full((100,), number))])
        scatter.write(7, *parts[0])
        scatter.finish()
        assert float(target.detach().sum()) == 100 * number


def test_presence_has_a_bit_per_segment_and_absent_ones_no_bytes():
    tensors = [torch.nn.Parameter(torch.zeros(n)) for n in (10, 200, 5, 300)]
    plan = plan_of(*tensors, partition_bytes=1024)
    flats = HostCopies().flats([torch.ones(10), None, torch.ones(5), None])
    for partition in plan.partitions:
        presence, parts = plan.gather(partition, flats)
        segments = plan.layout(partition).segments
        bits = [bool(presence[i >> 3] >> (i & 7) & 1) for i in range(len(segments))]
        assert bits == [s.tensor in (0, 2) for s in segments]
        assert len(parts) == sum(bits)
        assert len(presence) == -(-len(segments) // 8)  # all absent is not the same as empty: all present


def test_frames_outside_a_partition_are_refused():
    plan = plan_of(torch.nn.Parameter(torch.zeros(16)))
    scatter = Scatter([plan])
    scatter.prepare()
    with pytest.raises(ParameshError) as caught:
        scatter.write(7, 64, memoryview(bytes(64)))
    assert caught.value.reason == "PAYLOAD_SIZE"


def test_empty_parameters_are_left_out_and_integers_refused_by_name():
    plan = plan_of(torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.zeros(4)))
    assert plan.names == ["p1"]
    with pytest.raises(ParameshError, match="p0") as caught:
        plan_of(torch.zeros(3, dtype=torch.int64))
    assert caught.value.reason == "DTYPE"


def test_names_tied_once_foreign_by_place_compiled_as_plain():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(3, 3)
            self.b = torch.nn.Linear(3, 3)
            self.b.weight = self.a.weight

    model = Model()
    temperature = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [temperature]}], lr=0.1)
    names = [[name for name, _ in group] for group in named_parameters(model, optimizer.param_groups)]
    assert names == [["a.weight", "a.bias", "b.bias"], ["group.1.0"]]
    assert wire_name("_orig_mod.layer.weight") == "layer.weight"
    assert wire_name("heads.ä b.weight") != wire_name("heads.ö b.weight")
    assert len(wire_name("x" * 1000)) <= 256


# ---------------------------------------------------------------------- edits


class Pulled:
    """A parameter that was "pulled", with the frames that a server would have sent."""

    def __init__(self, *tensors):
        self.plan = plan_of(*tensors)
        self.edits = Edits([self.plan])
        self.pull()

    def pull(self):
        self.edits.begin()
        for partition in self.plan.partitions:
            flat = partition_bytes(self.plan, partition, HostCopies().flats(self.plan.parameters))
            frame = types_pb2.Frame(length=len(flat), codec=types_pb2.CODEC_NONE)
            frame.checksum_kind = types_pb2.CHECKSUM_KIND_CRC32
            frame.checksum = checksum((flat.data,), types_pb2.CHECKSUM_KIND_CRC32)
            self.edits.note(partition, frame)
        self.edits.remember()

    def changed(self):
        """The parameter that PARAMETERS_CHANGED names, None if nothing is noticed."""
        try:
            self.edits.check()
        except ParametersChanged as error:
            return error.metadata["parameter"]
        return None


def edit_in_place(p):
    with torch.no_grad():
        p.add_(1)


def edit_data(p):
    p.data.clamp_(-0.01, 0.01)


def replace_data(p):
    p.data = p.data + 1


def edit_one_element(p):
    with torch.no_grad():
        p.view(-1)[p.numel() // 2] += 1


@pytest.mark.parametrize("edit", [edit_in_place, edit_data, replace_data, edit_one_element])
@pytest.mark.parametrize("shape", [(3,), (1000,), (70, 90)], ids=str)
def test_edits_are_noticed_and_named(edit, shape):
    first, second = (torch.nn.Parameter(filled(shape, torch.float32, seed)) for seed in (1, 2))
    pulled = Pulled(first, second)
    assert pulled.changed() is None
    edit(second)
    assert pulled.changed() == "p1"
    pulled.pull()
    assert pulled.changed() is None


def test_the_error_names_the_way_out():
    pulled = Pulled(torch.nn.Parameter(torch.ones(3)))
    edit_in_place(pulled.plan.parameters[0])
    with pytest.raises(ParametersChanged, match=r"paramesh\.assign\(model\)") as caught:
        pulled.edits.check()
    assert caught.value.reason == "PARAMETERS_CHANGED"


def test_rewriting_the_same_values_is_no_edit():
    p = torch.nn.Parameter(torch.randn(500))
    pulled = Pulled(p)
    with torch.no_grad():
        p.copy_(p.detach().clone())
    p.data = p.data.clone()
    assert pulled.changed() is None


def test_before_the_first_pull_and_after_forget_nothing_is_held_against_the_user():
    p = torch.nn.Parameter(torch.randn(5))
    edits = Edits([plan_of(p)])
    edit_in_place(p)
    edits.check()
    pulled = Pulled(p)
    edit_in_place(p)
    pulled.edits.forget()
    assert pulled.changed() is None
