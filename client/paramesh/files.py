"""A folder of files that is there whole or not at all, on any fsspec file system.

    written = Folder(path).write({"a.safetensors": data}, {"format": 1, ...})
    manifest, read = Folder(path).open()          # every digest verified

`MANIFEST.json` lists size and sha256 of every other file; a folder without one does not
exist. On a local disk the folder appears by one rename, after fsync of each file and before
fsync of its parent; on an object store, which has no rename, the manifest is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from paramesh.errors import ParameshError, refuse

__all__ = ["MANIFEST", "Folder", "write_file"]

MANIFEST = "MANIFEST.json"

BLOCK = 8 << 20
"""Bytes read at once for a digest."""


def _refused(path: str, error: Exception) -> ParameshError:
    return refuse("PATH", f"{path}: {error}", path=path)


def _resolve(path: str | os.PathLike[str]) -> tuple[Any, str]:
    try:
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
    fs, place = _resolve(path)
    temporary = f"{place}.tmp-{secrets.token_hex(4)}" if isinstance(fs, LocalFileSystem) else place
    try:
        parent = os.path.dirname(place)
        if parent:
            fs.makedirs(parent, exist_ok=True)
        _put(fs, temporary, data)
        if temporary != place:
            os.replace(temporary, place)
            _sync_folder(parent)
    except OSError as error:
        if temporary != place:
            with contextlib.suppress(OSError):
                fs.rm(temporary)
        raise _refused(place, error) from error


def _put(fs: Any, place: str, data: bytes) -> None:
    with fs.open(place, "wb") as file:
        file.write(data)
        if isinstance(fs, LocalFileSystem):
            file.flush()
            os.fsync(file.fileno())


def _sync_folder(place: str) -> None:
    """Make a rename in a local folder durable."""
    handle = os.open(place or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Folder:
    """A folder with a manifest.

    Args:
        path: a local path, or a URL that fsspec knows ("s3://bucket/run/1").

    Raises:
        RequestRefused: PATH, if fsspec cannot resolve it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._fs, self._place = _resolve(path)
        self._local = isinstance(self._fs, LocalFileSystem)

    # ------------------------------------------------------------------ writing

    def write(self, files: Iterable[tuple[str, bytes]], manifest: Mapping[str, Any]) -> None:
        """Write files and, when they are all safe, the manifest; replaces an older folder.

        Args:
            files: (name, content), taken one at a time.
            manifest: JSON values; "files" is added.

        Raises:
            RequestRefused: PATH; nothing is left behind, and an older folder is as it was.
        """
        target = f"{self._place}.tmp-{secrets.token_hex(4)}" if self._local else self._place
        try:
            self._fs.makedirs(target, exist_ok=True)
            if not self._local:
                self._forget_manifest()
            listed = {}
            for name, data in files:
                _put(self._fs, f"{target}/{name}", data)
                listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            document = json.dumps({**manifest, "files": listed}, indent=1, sort_keys=True)
            _put(self._fs, f"{target}/{MANIFEST}", document.encode())
            if self._local:
                self._appear(target)
        except OSError as error:
            raise _refused(self.path, error) from error
        finally:
            if self._local:
                with contextlib.suppress(OSError):
                    self._fs.rm(target, recursive=True)

    def _forget_manifest(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(f"{self._place}/{MANIFEST}")

    def _appear(self, target: str) -> None:
        _sync_folder(target)
        old = f"{self._place}.old-{secrets.token_hex(4)}"
        replaced = os.path.isdir(self._place)
        if replaced:
            os.rename(self._place, old)
        try:
            os.rename(target, self._place)
        except OSError:
            if replaced:
                os.rename(old, self._place)
            raise
        _sync_folder(os.path.dirname(self._place))
        if replaced:
            with contextlib.suppress(OSError):
                self._fs.rm(old, recursive=True)

    # ------------------------------------------------------------------ reading

    def open(self) -> dict[str, Any]:
        """Verify the digest of every file.

        Returns:
            The manifest.

        Raises:
            StateRefused: NOT_FOUND, without a manifest.
            RequestRefused: FORMAT, naming a file that is missing, short or altered; PATH.
        """
        try:
            with self._fs.open(f"{self._place}/{MANIFEST}", "rb") as file:
                manifest = json.loads(file.read())
            listed = manifest["files"]
            for name, entry in listed.items():
                self._verify(name, int(entry["bytes"]), str(entry["sha256"]))
        except FileNotFoundError as error:
            raise refuse("NOT_FOUND", f"no complete checkpoint at {self.path}: {error}", path=self.path) from None
        except OSError as error:
            raise _refused(self.path, error) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise refuse("FORMAT", f"{self.path}/{MANIFEST} is not a manifest: {error}", path=self.path) from None
        return dict(manifest)

    def _verify(self, name: str, size: int, digest: str) -> None:
        if "/" in name or name in ("", ".", ".."):
            raise refuse("FORMAT", f"{self.path}/{MANIFEST} names the file {name!r}", path=self.path)
        running, count = hashlib.sha256(), 0
        with self._fs.open(f"{self._place}/{name}", "rb") as file:
            while block := file.read(BLOCK):
                running.update(block)
                count += len(block)
        if count != size or running.hexdigest() != digest:
            raise refuse(
                "FORMAT",
                f"{self.path}/{name} is damaged: {count} bytes of {size}, or another digest than the manifest's",
                path=f"{self.path}/{name}",
            )

    def read(self, name: str) -> bytes:
        """A file's bytes, after `open`.

        Raises:
            RequestRefused: PATH.
        """
        try:
            with self._fs.open(f"{self._place}/{name}", "rb") as file:
                return bytes(file.read())
        except OSError as error:
            raise _refused(f"{self.path}/{name}", error) from error
