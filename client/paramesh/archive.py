"""The cluster's checkpoints under one root, and what is in the manifest of one.

    archive = Archive("s3://bucket/run")
    archive.names()                                  # of complete ones, oldest first
    manifest = archive.manifest("checkpoint-000007") # typed, strictly read
    archive.prune(keep=3)                            # never the newest complete one

Callers give names, never paths: a name is one folder directly under the root.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from paramesh.errors import ParameshError, refuse
from paramesh.failpoints import reach
from paramesh.files import MANIFEST, TEMPORARY, Draft, Folder, resolve, vanish
from paramesh.manifest import Entry, Fields, check_name, file_entries

__all__ = ["FORMAT", "KIND", "LATEST", "Archive", "ClusterManifest", "GroupEntry", "PartitionEntry", "TableRecord"]

FORMAT = 1
"""Version of the layout of cluster checkpoints; raised when an older Paramesh could not read it."""

KIND = "cluster"

LATEST = "latest"
"""Instead of a name: the newest checkpoint that is whole."""

LEVELS = ("step", "partition", "aligned")

PERIODIC = re.compile(r"checkpoint-([0-9]{6,15})")
"""Names that the cluster gives by itself."""


@dataclass(frozen=True)
class TableRecord:
    """A table as it was."""

    table_id: int
    name: str
    group: str
    first_partition: int
    partition_count: int
    spec: bytes
    """The TableSpec, serialised."""


@dataclass(frozen=True)
class PartitionEntry:
    """One partition's file. Partition 0 is the ledger."""

    partition: int
    table_id: int
    index: int
    nbytes: int
    epoch: int
    lsn: int
    applied_step: int
    group: int
    file: str


@dataclass(frozen=True)
class GroupEntry:
    """Where a table group stood."""

    group: int
    name: str
    steps: bool
    next_step: int


@dataclass(frozen=True)
class ClusterManifest:
    """What a cluster's checkpoint says of itself.

    Raises:
        RequestRefused: FORMAT, from `read`.
    """

    name: str
    number: int
    """Rises with every checkpoint of the root."""
    level: str
    job: str
    generation: int
    term: int
    created_at_ms: int
    """Wall clock, for people."""
    periodic: bool
    """Made by --checkpoint-every: `prune` may remove it."""
    next_client: int
    next_table: int
    next_partition: int
    tables: tuple[TableRecord, ...]
    partitions: tuple[PartitionEntry, ...]
    groups: tuple[GroupEntry, ...]
    workers: tuple[str, ...] = ()
    """Keys of the workers' own state, as of the cut; their files are `worker-N.bin` in order."""
    torn: tuple[int, ...] = ()
    """Level aligned: clients that died in the middle of an update while it was made; some of it may be there."""
    files: Mapping[str, Entry] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON values; "files" is the folder's to add."""
        plain = dataclasses.asdict(dataclasses.replace(self, files={}))
        del plain["files"]
        for table in plain["tables"]:
            table["spec"] = base64.b64encode(table["spec"]).decode()
        return {**plain, "format": FORMAT, "kind": KIND, "tool": "paramesh"}

    @classmethod
    def read(cls, document: Mapping[str, Any], where: str) -> ClusterManifest:
        """The manifest of a parsed document.

        Raises:
            RequestRefused: FORMAT, naming what is wrong.
            StateRefused: VERSION, a newer Paramesh wrote it.
        """
        _check_kind(document, where)
        known = frozenset({f.name for f in dataclasses.fields(cls)} | {"format", "kind", "tool"})
        fields = Fields(document, where, known)
        made = cls(
            name=fields.text("name"),
            number=fields.number("number"),
            level=fields.text("level"),
            job=fields.text("job"),
            generation=fields.number("generation", 1),
            term=fields.number("term"),
            created_at_ms=fields.number("created_at_ms"),
            periodic=fields.flag("periodic"),
            next_client=fields.number("next_client", 1),
            next_table=fields.number("next_table", 1),
            next_partition=fields.number("next_partition", 1, 1 << 32),
            tables=tuple(_table(f) for f in fields.objects("tables", _keys(TableRecord))),
            partitions=tuple(_partition(f) for f in fields.objects("partitions", _keys(PartitionEntry))),
            groups=tuple(_group(f) for f in fields.objects("groups", _keys(GroupEntry))),
            workers=_texts(document.get("workers"), fields),
            torn=_numbers(document.get("torn", []), fields),
            files=file_entries(document, where),
        )
        _check(made, fields)
        return made

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.bytes for entry in self.files.values())


def _check_kind(document: Mapping[str, Any], where: str) -> None:
    if document.get("kind") != KIND:
        raise refuse(
            "FORMAT", f"{where} is not a checkpoint by the cluster (paramesh.load reads those of paramesh.save)"
        )
    version = document.get("format")
    if type(version) is int and version > FORMAT:
        raise refuse("VERSION", f"{where} has format {version}; this release reads {FORMAT}: upgrade Paramesh")
    if version != FORMAT:
        raise refuse("FORMAT", f"{where} has format {version!r:.40}; this release reads {FORMAT}")


def _keys(cls: type[Any]) -> frozenset[str]:
    return frozenset(f.name for f in dataclasses.fields(cls))


def _texts(value: object, fields: Fields) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise fields.refuse("workers is not a list of strings")
    return tuple(value)


def _numbers(value: object, fields: Fields) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise fields.refuse("torn is not a list of client ids")
    return tuple(value)


def _table(f: Fields) -> TableRecord:
    try:
        spec = base64.b64decode(f.text("spec"), validate=True)
    except (ValueError, binascii.Error):
        raise f.refuse("spec of a table is not base64") from None
    small = 1 << 32
    return TableRecord(
        f.number("table_id", 1, small), f.text("name"), f.text("group"), f.number("first_partition", 1, small),
        f.number("partition_count", 0, small), spec,
    )  # fmt: skip


def _partition(f: Fields) -> PartitionEntry:
    small = 1 << 32
    return PartitionEntry(
        f.number("partition", 0, small), f.number("table_id", 0, small), f.number("index", 0, small),
        f.number("nbytes"), f.number("epoch", 1), f.number("lsn"), f.number("applied_step"),
        f.number("group", 0, small), f.text("file"),
    )  # fmt: skip


def _group(f: Fields) -> GroupEntry:
    return GroupEntry(f.number("group", 1, 1 << 32), f.text("name"), f.flag("steps"), f.number("next_step"))


def _check(made: ClusterManifest, fields: Fields) -> None:
    """What every part says must fit the others."""
    if made.level not in LEVELS:
        raise fields.refuse(f"level {made.level[:40]!r} is not one of {', '.join(LEVELS)}")
    numbers = [p.partition for p in made.partitions]
    if len(set(numbers)) != len(numbers) or 0 not in numbers:
        raise fields.refuse("partitions are not each once, the ledger among them")
    expected = {
        t.first_partition + i: (t.table_id, i) for t in made.tables for i in range(min(t.partition_count, 1 << 20))
    }
    found = {p.partition: (p.table_id, p.index) for p in made.partitions if p.partition}
    if expected != found:
        raise fields.refuse("partitions are not those of the tables")
    if any(number >= made.next_partition for number in numbers):
        raise fields.refuse("next_partition is below a partition")
    needed = [p.file for p in made.partitions] + [worker_file(i) for i in range(len(made.workers))]
    missing = [name for name in needed if name not in made.files]
    if missing or len(set(needed)) != len(needed):
        raise fields.refuse(f"files lack {missing[0][:80]!r}" if missing else "two partitions have one file")


def worker_file(index: int) -> str:
    """The file of the index-th worker's own state."""
    return f"worker-{index}.bin"


class Archive:
    """The root of a job's checkpoints.

    Args:
        root: a local directory, or a URL that fsspec knows.

    Raises:
        RequestRefused: PATH.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._fs, self._place = resolve(root)
        self._local = isinstance(self._fs, LocalFileSystem)

    def _url(self, name: str) -> str:
        check_name(name)
        if name.endswith(TEMPORARY):
            raise refuse("PATH", f"{name!r} is a checkpoint that was never finished, or no name for one", name=name)
        if self._local:
            path = os.path.realpath(f"{self._place}/{name}")
            if os.path.dirname(path) != os.path.realpath(self._place):
                raise refuse("PATH", f"checkpoint {name!r} leads out of {self.root}", name=name)
            return path
        return str(self._fs.unstrip_protocol(f"{self._place}/{name}"))

    def folder(self, name: str) -> Folder:
        """A checkpoint's folder.

        Raises:
            RequestRefused: PATH.
        """
        return Folder(self._url(name))

    def draft(self, name: str) -> Draft:
        """A checkpoint to be written.

        Raises:
            RequestRefused: PATH; or the name is taken.
        """
        if name == LATEST:
            raise refuse("PATH", f"{LATEST!r} means the newest checkpoint; choose another name", name=name)
        if self.exists(name):
            raise refuse("PATH", f"checkpoint {name!r} is there already; choose another name", name=name)
        return self.folder(name).draft()

    def exists(self, name: str) -> bool:
        """Whether a complete one of the name is there."""
        return bool(self._fs.exists(f"{self._place}/{check_name(name)}/{MANIFEST}"))

    def names(self) -> list[str]:
        """Folders under the root, complete or not, by name.

        Raises:
            RequestRefused: PATH.
        """
        try:
            self._fs.invalidate_cache()
            found = self._fs.ls(self._place, detail=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise refuse("PATH", f"{self.root}: {error}", path=self.root) from error
        paths = (str(item["name"]).rstrip("/").rpartition("/")[2] for item in found if item["type"] == "directory")
        good = []
        for name in paths:
            with contextlib.suppress(ParameshError):
                good.append(check_name(name))
        return sorted(good)

    def manifest(self, name: str, *, verify: bool = False) -> ClusterManifest:
        """A checkpoint's manifest; with `verify`, every file's digest has been compared.

        Raises:
            StateRefused: NOT_FOUND, VERSION.
            RequestRefused: PATH, FORMAT, DAMAGED.
        """
        folder = self.folder(name)
        document = folder.open() if verify else folder.manifest()
        return ClusterManifest.read(document, folder.path)

    def complete(self) -> list[ClusterManifest]:
        """Manifests of all that can be read, oldest first."""
        found = []
        for name in self.names():
            with contextlib.suppress(ParameshError):
                found.append(dataclasses.replace(self.manifest(name), name=name))
        return sorted(found, key=lambda manifest: manifest.number)

    def newest_whole(self) -> tuple[ClusterManifest, dict[str, str]]:
        """The newest checkpoint of which every byte is there.

        Returns:
            Its manifest, and the newer ones that were passed over: name -> what is wrong.

        Raises:
            StateRefused: NOT_FOUND, there is none.
        """
        damaged: dict[str, str] = {}
        for found in reversed(self.complete()):
            try:
                return dataclasses.replace(self.manifest(found.name, verify=True), name=found.name), damaged
            except ParameshError as error:
                damaged[found.name] = str(error)
        raise refuse(
            "NOT_FOUND",
            f"{self.root} has no checkpoint that is whole" + "".join(f"; {problem}" for problem in damaged.values()),
        )

    def next_number(self) -> int:
        """One more than any that was given here, also to those that were never finished."""
        taken = [manifest.number for manifest in self.complete()]
        taken += [int(found[1]) for name in self.names() if (found := PERIODIC.match(name))]
        return max(taken, default=0) + 1

    def prune(self, keep: int) -> list[str]:
        """Remove periodic checkpoints but the newest `keep`; never the newest complete one.

        Returns:
            The names that were removed. What cannot be removed stays.
        """
        complete = self.complete()
        periodic = [manifest for manifest in complete[:-1] if manifest.periodic]
        kept = max(0, keep - (1 if complete and complete[-1].periodic else 0))
        gone = periodic[: len(periodic) - kept] if kept else periodic
        removed = []
        for manifest in gone:
            with contextlib.suppress(OSError, ParameshError):
                self.remove(manifest.name)
                removed.append(manifest.name)
        return removed

    def remove(self, name: str) -> None:
        """Remove a checkpoint: a half removed one does not exist, and `sweep` finds what is left of it.

        On a local disk its name goes first, in one act; elsewhere its manifest.

        Raises:
            RequestRefused: PATH.
            OSError: the file system's.
        """
        place = f"{self._place}/{check_name(name)}"
        self._url(name)
        reach("checkpoint.remove.begun")
        with contextlib.suppress(FileNotFoundError):
            if self._local:
                vanish(place)
                place += TEMPORARY
            else:
                self._fs.rm(f"{place}/{MANIFEST}")
        reach("checkpoint.remove.half")
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(place, recursive=True)
        reach("checkpoint.remove.done")

    def sweep(self) -> list[str]:
        """Remove what unfinished checkpoints and removals of an ended coordinator left on a local disk."""
        stale = [name for name in self.names() if name.endswith(TEMPORARY)] if self._local else []
        for name in stale:
            with contextlib.suppress(OSError):
                self._fs.rm(f"{self._place}/{name}", recursive=True)
        return stale
