"""What tests ask of a live cluster about checkpoints, as `psctl` does."""

from __future__ import annotations

import grpc
from paramesh.archive import Archive, ClusterManifest
from paramesh.channel import CHANNEL_OPTIONS, header
from paramesh.errors import ParameshError
from paramesh.status import from_rpc_error
from paramesh.v1 import checkpoint_pb2 as cp
from paramesh.v1.checkpoint_pb2_grpc import CheckpointsStub

from tests.cluster.handle import ClusterHandle


def _ask(cluster: ClusterHandle, method: str, request: object) -> object:
    with grpc.insecure_channel(cluster.coordinator_address, options=CHANNEL_OPTIONS) as channel:
        try:
            return getattr(CheckpointsStub(channel), method)(request, timeout=60)
        except grpc.RpcError as error:
            raise from_rpc_error(error, cluster.coordinator_address) from None


def task(cluster: ClusterHandle) -> cp.CheckpointTask:
    """What is under way, or ended last."""
    answer = _ask(cluster, "ListCheckpoints", cp.ListCheckpointsRequest(request=header("default")))
    assert isinstance(answer, cp.ListCheckpointsResponse)
    return answer.task


def begin(cluster: ClusterHandle, name: str = "", level: int = 0) -> str:
    """Begin a checkpoint; its name."""
    request = cp.CreateCheckpointRequest(
        request=header("default"), name=name, level=cp.CheckpointLevel.ValueType(level)
    )
    answer = _ask(cluster, "CreateCheckpoint", request)
    assert isinstance(answer, cp.CreateCheckpointResponse)
    return answer.name


def ended(cluster: ClusterHandle, deadline: float = 90.0) -> cp.CheckpointTask:
    """Wait until what was begun has ended; what came of it."""
    cluster.wait_until(lambda: task(cluster).ended, deadline, "the checkpoint or restore to end")
    return task(cluster)


def make(cluster: ClusterHandle, name: str = "", level: int = 0) -> str:
    """Make a checkpoint; its name."""
    made = begin(cluster, name, level)
    done = ended(cluster)
    assert not done.HasField("error"), done.error
    return made


def restore(cluster: ClusterHandle, name: str) -> None:
    """Take the job back, until every partition serves.

    Raises:
        ParameshError: it is refused.
    """
    _ask(cluster, "RestoreCheckpoint", cp.RestoreCheckpointRequest(request=header("default"), name=name))
    done = ended(cluster)
    assert not done.HasField("error"), done.error


def refused(cluster: ClusterHandle, name: str) -> ParameshError:
    """Why a checkpoint is not restored."""
    try:
        restore(cluster, name)
    except ParameshError as error:
        return error
    raise AssertionError(f"{name} was restored")


def whole(archive: Archive) -> list[ClusterManifest]:
    """All complete checkpoints, every digest compared."""
    return [archive.manifest(manifest.name, verify=True) for manifest in archive.complete()]
