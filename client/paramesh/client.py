"""`connect` and `Client`: tables without a training loop.

    with paramesh.connect("127.0.0.1:7070") as client:
        client.create_table("t", {"w": torch.zeros(10)}, "SGD", {"lr": 1.0})
        client.push("t", {"w": torch.ones(10)})      # applied exactly once
        values = client.pull("t")                    # {"w": tensor}

For tools, tests and hand-written loops; training scripts use `DistributedOptimizer`.
"""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from paramesh.async_client import READ_TIMEOUT_S, AsyncClient
from paramesh.config import ClientConfig, security_of
from paramesh.encoded import Encoded, SlotWrite, Snapshot
from paramesh.errors import ConfigError, refuse
from paramesh.io import IoThread
from paramesh.routing import PartitionLayout, cut
from paramesh.v1 import parameter_server_pb2 as ps
from paramesh.v1 import types_pb2 as pb

if TYPE_CHECKING:
    import concurrent.futures

    import torch

__all__ = ["AsyncClient", "Client", "Encoded", "SlotWrite", "Snapshot", "connect"]

_GRACE_S = 30.0
"""Seconds. How far above the client's own deadlines ours are: theirs, which say more, are to win."""


def _dtype(tensor: torch.Tensor) -> pb.DType.ValueType:
    name = str(tensor.dtype).removeprefix("torch.").upper()
    if f"DTYPE_{name}" not in pb.DType.keys():  # noqa: SIM118 - a protobuf enum, not a dict
        raise refuse("DTYPE", f"tensors of {tensor.dtype} cannot be in a table; floating point and complex can")
    return pb.DType.Value(f"DTYPE_{name}")


def _flat_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements, row-major, as bytes; complex as real pairs. May copy."""
    import torch

    plain = tensor.detach().cpu()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return memoryview(plain.contiguous().reshape(-1).view(torch.uint8).numpy().data)


class Client:
    """Synchronous access to tables. Make it with `connect`; use it as a context manager."""

    def __init__(self, client: AsyncClient, heart: concurrent.futures.Future[None] | None = None):
        self._client = client
        self._heart = heart
        """Beats until `close`: a silent client is evicted, and its pushes are refused for ever."""
        self._specs: dict[str, tuple[pb.TableSpec, tuple[PartitionLayout, ...]]] = {}

    @property
    def client_id(self) -> int:
        """This client's id, never reused."""
        return self._client.client_id

    def _run(self, coro: Any, what: str) -> Any:
        return IoThread.get().run(coro, max(READ_TIMEOUT_S, self._client.push_timeout) + _GRACE_S, what)

    def tables(self) -> list[str]:
        """Names of the tables in the newest map."""
        return [t.name for t in self._client.routes.map.tables]

    def create_table(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        optimizer: str = "SGD",
        hyper_parameters: Mapping[str, float] | None = None,
        partition_bytes: int = 0,
        acks: str = "isr",
    ) -> None:
        """Create a dense table with first values; nothing happens if it is there already.

        Args:
            name: [A-Za-z0-9_.:/-]{1,256}.
            tensors: name -> first values (their shape and dtype make the schema).
            optimizer: class name, such as "SGD".
            hyper_parameters: numbers, such as {"lr": 0.1}.
            partition_bytes: bound on a partition; 0: 32 MiB.
            acks: "isr", or "primary": pushes are acknowledged by one server, and may be lost with it.

        Raises:
            StateRefused: SCHEMA, if it exists with another schema.
            RequestRefused: NAME, DTYPE, SHAPE, QUOTA, UNSUPPORTED_OPTIMIZER, HYPER_PARAMETER.
        """
        spec = pb.TableSpec(
            name=name,
            group=name,
            tensors=[pb.TensorSpec(name=k, shape=v.shape, dtype=_dtype(v)) for k, v in tensors.items()],
            optimizer=pb.OptimizerSpec(
                class_name=optimizer,
                hyper_parameters=[
                    pb.HyperParameter(name=k, number=v) for k, v in (hyper_parameters or {"lr": 1.0}).items()
                ],
            ),
            partition_bytes=partition_bytes,
            acks=_acks(acks),
        )
        known = name in self.tables()
        self._run(self._client.create_table(spec), f"creating table {name!r}")
        self._specs[name] = (spec, cut(spec))
        if not known:
            self.assign(name, tensors, first=True)

    def _layout(self, table: str) -> tuple[pb.TableSpec, tuple[PartitionLayout, ...], range]:
        partitions = self._client.routes.partitions_of(table)
        if table not in self._specs:
            entry = self._client.routes.table(table)
            spec = self._run(self._client.describe_table(entry.table_id), f"the schema of {table!r}")
            self._specs[table] = (spec, cut(spec))
        spec, layouts = self._specs[table]
        return spec, layouts, partitions

    def _parts(self, table: str, tensors: Mapping[str, torch.Tensor]) -> dict[int, tuple[bytes, list[Any]]]:
        """Partition -> (presence bits, [(offset, bytes)]) of the given tensors."""
        spec, layouts, partitions = self._layout(table)
        index = {t.name: i for i, t in enumerate(spec.tensors)}
        flat: dict[int, memoryview] = {}
        for name, tensor in tensors.items():
            if name not in index:
                raise refuse("TENSOR_MISMATCH", f"table {table!r} has no tensor {name!r}", table=table)
            wanted = spec.tensors[index[name]]
            if list(tensor.shape) != list(wanted.shape) or _dtype(tensor) != wanted.dtype:
                raise refuse(
                    "TENSOR_MISMATCH",
                    f"tensor {name!r} of table {table!r} is {list(wanted.shape)} {pb.DType.Name(wanted.dtype)}, "
                    f"not {list(tensor.shape)} {tensor.dtype}",
                    table=table,
                    tensor=name,
                )
            flat[index[name]] = _flat_bytes(tensor)
        return {partition: _slice(layout, flat) for partition, layout in zip(partitions, layouts, strict=True)}

    def push(self, table: str, gradients: Mapping[str, torch.Tensor]) -> dict[int, ps.PartitionOutcome]:
        """Apply gradients with the table's optimizer, exactly once; absent tensors are skipped.

        Returns:
            partition -> outcome, with the log position it was applied at.

        Raises:
            TensorMismatch: shape or dtype differs. PartitionOffline: a server is lost.
            Timeout: the outcome is unknown; connect anew.
        """
        contributions = {
            p: Encoded.from_parts(p, presence, parts)
            for p, (presence, parts) in self._parts(table, gradients).items()
            if parts
        }
        outcomes: dict[int, ps.PartitionOutcome] = self._run(
            self._client.push_sequenced(contributions), f"a push to {table!r}"
        )
        return outcomes

    def assign(self, table: str, tensors: Mapping[str, torch.Tensor], *, first: bool = False) -> None:
        """Overwrite values; all tensors of the table when they are the first ones.

        Raises:
            TensorMismatch, PartitionOffline, Timeout: as `push`.
        """
        writes = {
            p: [SlotWrite(data, offset) for offset, data in parts]
            for p, (_, parts) in self._parts(table, tensors).items()
            if parts
        }
        self._run(self._client.assign(writes, init_attempt=1 if first else 0), f"values of {table!r}")

    def pull(self, table: str) -> dict[str, torch.Tensor]:
        """The newest values; one lsn per partition.

        Raises:
            RequestRefused: UNKNOWN_TABLE. PartitionOffline: a server is lost.
        """
        import torch

        spec, layouts, partitions = self._layout(table)
        buffers = {p: bytearray(layout.nbytes) for p, layout in zip(partitions, layouts, strict=True)}

        def sink(partition: int, head: ps.PullHeader, payload: memoryview) -> None:
            buffers[partition][head.frame.offset : head.frame.offset + head.frame.length] = payload

        self._run(self._client.pull(list(partitions), sink), f"values of {table!r}")
        values: dict[str, torch.Tensor] = {}
        for i, t in enumerate(spec.tensors):
            dtype = getattr(torch, pb.DType.Name(t.dtype).removeprefix("DTYPE_").lower())
            pieces = [
                bytes(buffers[p][s.offset : s.offset + s.nbytes])
                for p, layout in zip(partitions, layouts, strict=True)
                for s in layout.segments
                if s.tensor == i
            ]
            flat = torch.frombuffer(bytearray(b"".join(pieces)), dtype=dtype)
            values[t.name] = flat.reshape(list(t.shape))
        return values

    def inspect(self, table: str, *, state_hash: bool = True) -> dict[int, ps.PartitionInfo]:
        """What the servers say of the table's partitions: lsn, hash, bytes."""
        partitions = list(self._client.routes.partitions_of(table))
        info: dict[int, ps.PartitionInfo] = self._run(
            self._client.inspect(partitions, state_hash=state_hash), f"an inspection of {table!r}"
        )
        return info

    def close(self) -> None:
        """Say goodbye and close."""
        if self._heart is not None:
            self._heart.cancel()
        self._run(self._client.deregister(), "saying goodbye")
        self._run(self._client.close(), "closing")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


def _slice(layout: PartitionLayout, flat: Mapping[int, memoryview]) -> tuple[bytes, list[Any]]:
    bits = bytearray(-(-len(layout.segments) // 8))
    parts: list[tuple[int, memoryview]] = []
    for i, s in enumerate(layout.segments):
        if s.tensor not in flat:
            continue
        bits[i // 8] |= 1 << (i % 8)
        size = s.nbytes // s.length
        parts.append((s.offset, flat[s.tensor][s.start * size : (s.start + s.length) * size]))
    return bytes(bits), parts


def connect(coordinators: str, job: str = "default", *, timeout: float = 30.0) -> Client:
    """Connect to a cluster as a tool: no rank, no steps, no data leases.

    Certificate and token are those of the environment: PARAMESH_TLS_CERT, PARAMESH_TOKEN_FILE and their like.

    Args:
        coordinators: `host:port[,host:port...]`.
        job: the cluster's name.
        timeout: seconds.

    Raises:
        AccessDenied: UNAUTHENTICATED or PERMISSION_DENIED.
        ConfigError: a security setting is missing or wrong.
        Unavailable: UNREACHABLE, if no coordinator answers.
    """
    from paramesh.heart import beat

    security = security_of({**os.environ, "PARAMESH_JOB": job})
    io = IoThread.get()
    connecting = AsyncClient.connect(coordinators, job, role="tool", timeout=timeout, security=security)
    client = io.run(connecting, timeout + 5, "a coordinator")
    heart = io.submit(beat(client, ClientConfig(coordinators=coordinators, job=job)))
    return Client(client, heart)


def _acks(acks: str) -> pb.Acks.ValueType:
    from paramesh.options import ACKS

    if acks not in ACKS:
        raise ConfigError(f"acks={acks!r} must be one of {', '.join(map(repr, ACKS))}")
    return ACKS[acks]
