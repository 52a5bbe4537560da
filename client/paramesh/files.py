"""A folder of files that is there whole or not at all, on any fsspec file system.

    Folder(path).write({"a.safetensors": data}.items(), {"format": 1, ...})
    manifest = Folder(path).open()          # every digest verified

    draft = Folder(path).draft()            # the same in pieces, by several processes
    draft.begin(); draft.put("a.safetensors", chunks); draft.commit(manifest, files)

`MANIFEST.json` lists size and sha256 of every other file; a folder without one does not
exist. On a local disk the folder appears by one rename, after fsync of each file and before
fsync of its parent; on an object store, which has no rename, the manifest is written last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from paramesh.errors import ParameshError, refuse
from paramesh.failpoints import reach
from paramesh.manifest import MAX_BYTES, Entry, encode, file_entries, parse

__all__ = ["MANIFEST", "TEMPORARY", "Draft", "Folder", "resolve", "vanish", "write_file"]

MANIFEST = "MANIFEST.json"

TEMPORARY = ".tmp"
"""What the name of a folder that is being written ends with, on a local disk."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Linux's numbers for `renameat2`."""

BLOCK = 8 << 20
"""Bytes read at once for a digest."""


def _refused(path: str, error: Exception) -> ParameshError:
    return refuse("PATH", f"{path}: {error}", path=path)


def resolve(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """The file system of a path or URL, and the place on it without a slash at its end.

    Raises:
        RequestRefused: PATH.
    """
    try:
        if "\0" in os.fspath(path):
            raise ValueError("a path has no NUL")
        fs, place = fsspec.core.url_to_fs(os.fspath(path))
    except (ImportError, ValueError, TypeError) as error:
        raise _refused(os.fspath(path), error) from None
    if not place.rstrip("/"):
        raise refuse("PATH", f"{os.fspath(path)!r} is no path for a checkpoint", path=os.fspath(path))
    return fs, place.rstrip("/")


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write one file, whole or not at all.

    Raises:
        RequestRefused: PATH, if the file system says no (full, read-only, not there).
    """
    fs, place = resolve(path)
    temporary = f"{place}.tmp-{secrets.token_hex(4)}" if isinstance(fs, LocalFileSystem) else place
    try:
        parent = os.path.dirname(place)
        if parent:
            fs.makedirs(parent, exist_ok=True)
        _put(fs, temporary, [data])
        if temporary != place:
            _rename(temporary, place)
            _sync_folder(parent)
    except OSError as error:
        if temporary != place:
            with contextlib.suppress(OSError):
                fs.rm(temporary)
        raise _refused(place, error) from error


def vanish(place: str) -> None:
    """Give a local folder the name of one that is not finished, durably: from here on it does not exist.

    Raises:
        OSError: the file system's.
    """
    _rename(place, place + TEMPORARY)
    _sync_folder(os.path.dirname(place))


# What touches a disk, one function each: tests stand in for a full disk or a lost power.


def _put(fs: Any, place: str, chunks: Iterable[Any]) -> Entry:
    """Write a file and make it durable; never through a symbolic link."""
    running, count, name = hashlib.sha256(), 0, os.path.basename(place)
    reach("checkpoint.file.begun", name)
    with _opened(fs, place, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            running.update(chunk)
            count += len(chunk)
            reach("checkpoint.file.half", name)
        reach("checkpoint.file.written", name)
        if isinstance(fs, LocalFileSystem):
            _sync_file(file)
    reach("checkpoint.file.synced", name)
    return Entry(count, running.hexdigest())


def _sync_file(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(place: str) -> None:
    """Make a rename in a local folder durable."""
    handle = os.open(place or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(old: str, new: str) -> None:
    os.replace(old, new)


def _exchange(one: str, other: str) -> bool:
    """Swap two names in one act; False where the system cannot (it is Linux's, on most file systems)."""
    try:
        act = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(act(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _opened(fs: Any, place: str, mode: str) -> Any:
    """Open a file; on a local disk a symbolic link in its place is refused."""
    if not isinstance(fs, LocalFileSystem):
        return fs.open(place, mode)
    flags = os.O_RDONLY if mode == "rb" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    return os.fdopen(os.open(place, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), mode)


class Draft:
    """A folder that is being written, perhaps by several processes: it does not exist yet.

    Args:
        path: of the folder, as it will be called.
        temporary: where it is until then, on a local disk; others write in place.
    """

    def __init__(self, path: str, temporary: str) -> None:
        self.path = path
        self._fs, self._place = resolve(path)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._target = temporary if self._local else self._place
        self.url = self._fs.unstrip_protocol(self._target) if not self._local else self._target
        """Where files go, for other processes."""

    def begin(self) -> None:
        """Make the folder; what an earlier attempt left there goes.

        Raises:
            RequestRefused: PATH.
        """
        try:
            if self._local:
                self._remove()
            else:
                self._forget_manifest()
            self._fs.makedirs(self._target, exist_ok=True)
        except OSError as error:
            raise _refused(self.path, error) from error

    def put(self, name: str, chunks: Iterable[Any]) -> Entry:
        """Write a file of bytes-like chunks and make it durable.

        Raises:
            RequestRefused: PATH, naming what the file system said.
        """
        try:
            return _put(self._fs, f"{self._target}/{name}", chunks)
        except OSError as error:
            raise _refused(f"{self.path}/{name}", error) from error

    def size(self, name: str) -> int | None:
        """Bytes of a file that is there; None if it is not."""
        try:
            return int(self._fs.info(f"{self._target}/{name}")["size"])
        except OSError:
            return None

    def commit(self, manifest: Mapping[str, Any], files: Mapping[str, Entry], *, replace: bool = False) -> None:
        """Write the manifest and let the folder appear.

        Args:
            manifest: JSON values; "files" is added.
            files: what is in it, all of it durable.
            replace: an older folder of the name goes.

        Raises:
            RequestRefused: PATH.
        """
        listed = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in files.items()}
        try:
            _put(self._fs, f"{self._target}/{MANIFEST}", [encode({**manifest, "files": listed})])
            if self._local:
                self._appear(replace=replace)
        except OSError as error:
            raise _refused(self.path, error) from error

    def abort(self) -> None:
        """Remove what was written; never raises."""
        with contextlib.suppress(Exception):
            if not self._local:
                self._forget_manifest()
            self._remove()

    def _remove(self) -> None:
        """Out of the way first: another process may be about to write one more file into it."""
        gone = self._target
        with contextlib.suppress(FileNotFoundError):
            if self._local:
                gone = f"{self._place}.{secrets.token_hex(4)}{TEMPORARY}"
                os.rename(self._target, gone)
            self._fs.rm(gone, recursive=True)

    def _forget_manifest(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(f"{self._place}/{MANIFEST}")

    def _appear(self, *, replace: bool) -> None:
        _sync_folder(self._target)
        reach("checkpoint.rename.begun")
        parent = os.path.dirname(self._place)
        if not os.path.lexists(self._place):
            _rename(self._target, self._place)
            reach("checkpoint.rename.done")
            _sync_folder(parent)
        elif not replace:
            raise FileExistsError(errno.EEXIST, "exists already", self._place)
        else:
            if not _exchange(self._target, self._place):
                self._replace_in_two()
            _sync_folder(parent)
            with contextlib.suppress(OSError):
                self._remove()  # the older one, under the new one's temporary name

    def _replace_in_two(self) -> None:
        """Where names cannot be swapped: a crash between the two leaves the older one as `.old-...`."""
        old = f"{self._place}.old-{secrets.token_hex(4)}"
        _rename(self._place, old)
        try:
            _rename(self._target, self._place)
        except OSError:
            _rename(old, self._place)
            raise
        _rename(old, self._target)


class Folder:
    """A folder with a manifest.

    Args:
        path: a local path, or a URL that fsspec knows ("s3://bucket/run/1").

    Raises:
        RequestRefused: PATH, if fsspec cannot resolve it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._fs, self._place = resolve(path)
        self._entries: dict[str, Entry] = {}

    # ------------------------------------------------------------------ writing

    def draft(self) -> Draft:
        """The folder as it is being written: `NAME.tmp` on a local disk."""
        return Draft(self.path, f"{self._place}{TEMPORARY}")

    def write(self, files: Iterable[tuple[str, bytes]], manifest: Mapping[str, Any]) -> None:
        """Write files and, when they are all safe, the manifest; replaces an older folder.

        Args:
            files: (name, content), taken one at a time.
            manifest: JSON values, read when all files are written; "files" is added.

        Raises:
            RequestRefused: PATH; nothing is left behind, and an older folder is as it was.
        """
        draft = Draft(self.path, f"{self._place}{TEMPORARY}-{secrets.token_hex(4)}")
        try:
            draft.begin()
            listed = {name: draft.put(name, [data]) for name, data in files}
            draft.commit(manifest, listed, replace=True)
        finally:
            if isinstance(self._fs, LocalFileSystem):
                draft.abort()

    # ------------------------------------------------------------------ reading

    def manifest(self) -> dict[str, Any]:
        """The manifest, strictly read; no other file is looked at.

        Raises:
            StateRefused: NOT_FOUND, without a manifest.
            RequestRefused: FORMAT, PATH.
        """
        try:
            with _opened(self._fs, f"{self._place}/{MANIFEST}", "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError) as error:
            if self._place.endswith((".pt", ".pth", ".pkl", ".ckpt", ".bin")):
                raise _pickled(self.path) from None
            raise refuse("NOT_FOUND", f"no complete checkpoint at {self.path}: {error}", path=self.path) from None
        except OSError as error:
            raise _refused(self.path, error) from error
        document = parse(data, self.path)
        self._entries = file_entries(document, self.path)
        return document

    def open(self) -> dict[str, Any]:
        """Verify the digest of every file.

        Returns:
            The manifest.

        Raises:
            StateRefused: NOT_FOUND, without a manifest.
            RequestRefused: FORMAT; DAMAGED, naming a file that is missing, short or altered; PATH.
        """
        document = self.manifest()
        for name in self._entries:
            self.verify(name)
        return document

    def verify(self, name: str) -> None:
        """Compare a file with the manifest that was read before.

        Raises:
            RequestRefused: DAMAGED, naming it; PATH.
        """
        running, count = hashlib.sha256(), 0
        try:
            with _opened(self._fs, f"{self._place}/{name}", "rb") as file:
                while block := file.read(BLOCK):
                    running.update(block)
                    count += len(block)
        except FileNotFoundError:
            raise self._damaged(name, "it is missing") from None
        except OSError as error:
            raise _refused(f"{self.path}/{name}", error) from error
        self._compare(name, count, running.hexdigest())

    def _compare(self, name: str, count: int, digest: str) -> None:
        entry = self._entries[name]
        if count != entry.bytes:
            raise self._damaged(name, f"{count} bytes of {entry.bytes}")
        if digest != entry.sha256:
            raise self._damaged(name, "another digest than the manifest's")

    def _damaged(self, name: str, why: str) -> ParameshError:
        return refuse("DAMAGED", f"{self.path}/{name} is damaged: {why}", path=f"{self.path}/{name}")

    def strangers(self) -> list[str]:
        """Files in the folder that the manifest, read before, does not list; none if it cannot be listed."""
        try:
            found = self._fs.ls(self._place, detail=False)
        except OSError:
            return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if name not in self._entries and name != MANIFEST)

    def read(self, name: str) -> bytes:
        """A file's bytes, compared with the manifest that was read before.

        Raises:
            RequestRefused: DAMAGED, PATH.
        """
        try:
            with _opened(self._fs, f"{self._place}/{name}", "rb") as file:
                data = bytes(file.read())
        except FileNotFoundError:
            raise self._damaged(name, "it is missing") from None
        except OSError as error:
            raise _refused(f"{self.path}/{name}", error) from error
        if name in self._entries:
            self._compare(name, len(data), hashlib.sha256(data).hexdigest())
        return data

    def read_as(self, name: str, size: int, digest: str) -> bytes:
        """A file's bytes, compared with what somebody who read the manifest says of it.

        Raises:
            RequestRefused: DAMAGED, PATH.
        """
        self._entries[name] = Entry(size, digest)
        return self.read(name)


def _pickled(path: str) -> ParameshError:
    return refuse(
        "FORMAT",
        f"{path} is a file of torch.save, which may run code when it is read: load it in a script of your own "
        "(torch.load(..., weights_only=True)) and write it with paramesh.save or paramesh.export",
        path=path,
    )
