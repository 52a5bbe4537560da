"""GPU tensors take the same path as CPU ones, by way of pinned buffers."""

import pytest
import torch
from paramesh.encoded import Encoded
from paramesh.tensors import DTYPES, HostCopies, Scatter, TablePlan
from paramesh.v1 import types_pb2

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (65,), (3, 5, 7)], ids=str)
def test_round_trip_is_exact_and_buffers_are_kept(dtype, shape):
    target = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda"))
    plan = TablePlan("t", "g", [("p", target)], types_pb2.OptimizerSpec(class_name="SGD"), 512)
    plan.place(1, 1)
    host, scatter = HostCopies(), Scatter([plan])
    for seed in (1, 2):
        source = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()
        scatter.prepare()
        for partition in plan.partitions:
            presence, parts = plan.gather(partition, host.flats([source]))
            for offset, _, buffers in Encoded.from_parts(partition, presence, parts).frames():
                scatter.write(partition, offset, memoryview(b"".join(buffers)))
        scatter.finish()
        assert torch.equal(target.detach(), source)
    assert len(host._buffers) == 1
