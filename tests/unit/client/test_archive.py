"""Checkpoints as folders: there whole or not at all, whatever happens and whenever."""

import contextlib
import errno
import hashlib
import os
import shutil
import uuid

import fsspec
import pytest
from paramesh import files
from paramesh.archive import Archive
from paramesh.errors import ParameshError
from paramesh.files import Draft, Folder
from paramesh.manifest import Entry

from tests.unit.client.test_manifest import GOOD

CONTENT = {"ledger.bin": b"L" * 10, "partition-1.safetensors": b"P" * 1000, "worker-0.bin": b"W"}


def make(archive, name, number, *, periodic=True):
    draft = archive.draft(name)
    draft.begin()
    listed = {file: draft.put(file, [data[:3], data[3:]]) for file, data in CONTENT.items()}
    manifest = {**GOOD.document(), "name": name, "number": number, "periodic": periodic}
    draft.commit(manifest, listed)


def write(draft, number):
    draft.begin()
    listed = {file: draft.put(file, [data]) for file, data in CONTENT.items()}
    draft.commit({**GOOD.document(), "name": f"checkpoint-{number:06d}", "number": number}, listed)


@pytest.fixture(params=["local", "memory"])
def archive(request, tmp_path):
    return Archive(str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4()}/root")


def test_a_checkpoint_is_listed_read_and_verified(archive):
    assert archive.names() == []
    assert archive.next_number() == 1
    make(archive, "checkpoint-000004", 4)
    assert archive.names() == ["checkpoint-000004"]
    manifest = archive.manifest("checkpoint-000004", verify=True)
    assert (manifest.number, manifest.size) == (4, 1011)
    assert archive.next_number() == 5
    assert archive.folder("checkpoint-000004").read("ledger.bin") == CONTENT["ledger.bin"]


def test_a_name_is_given_once(archive):
    make(archive, "a", 1)
    with pytest.raises(ParameshError, match="choose another name") as caught:
        archive.draft("a")
    assert caught.value.reason == "PATH"


def test_retention_keeps_the_newest_and_those_made_by_hand(archive):
    for number in range(1, 6):
        make(archive, f"checkpoint-{number:06d}", number, periodic=number != 2)
    assert archive.prune(2) == ["checkpoint-000001", "checkpoint-000003"]
    assert archive.names() == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000005"]
    make(archive, "by-hand", 6, periodic=False)
    assert archive.prune(1) == ["checkpoint-000004"]
    assert "by-hand" in archive.names()


def test_retention_never_takes_the_newest_complete_one(archive):
    make(archive, "checkpoint-000001", 1)
    make(archive, "checkpoint-000002", 2)
    place = archive.folder("checkpoint-000002")
    place._fs.rm(f"{place._place}/MANIFEST.json")
    assert archive.prune(1) == []
    assert archive.manifest("checkpoint-000001", verify=True)


@pytest.mark.parametrize("name", ["..", "a/b", "/etc", "a\0b", "."])
@pytest.mark.bad_input(57, got="PATH or NAME")
def test_names_do_not_leave_the_root(archive, name):
    for act in (archive.folder, archive.draft, archive.manifest, archive.remove, archive.exists):
        with pytest.raises(ParameshError) as caught:
            act(name)
        assert caught.value.reason == "PATH"


@pytest.mark.bad_input(57, got="PATH")
def test_links_do_not_leave_the_root(tmp_path):
    outside = Archive(str(tmp_path / "outside"))
    make(outside, "c", 1)
    root = tmp_path / "root"
    root.mkdir()
    (root / "c").symlink_to(tmp_path / "outside" / "c")
    archive = Archive(str(root))
    with pytest.raises(ParameshError, match="leads out") as caught:
        archive.manifest("c")
    assert caught.value.reason == "PATH"
    assert archive.complete() == []


@pytest.mark.bad_input(57, got="not followed")
def test_files_that_are_links_are_not_followed(tmp_path):
    archive = Archive(str(tmp_path))
    make(archive, "c", 1)
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT["ledger.bin"])
    (tmp_path / "c" / "ledger.bin").unlink()
    (tmp_path / "c" / "ledger.bin").symlink_to(secret)
    with pytest.raises(ParameshError) as caught:
        archive.manifest("c", verify=True)
    assert caught.value.reason == "PATH"
    draft = archive.draft("d")
    draft.begin()
    (tmp_path / "d.tmp" / "x").symlink_to(secret)
    with pytest.raises(ParameshError):
        draft.put("x", [b"overwritten"])
    assert secret.read_bytes() == CONTENT["ledger.bin"]


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone"])
@pytest.mark.parametrize("victim", sorted(CONTENT))
@pytest.mark.bad_input(58, 60, got="DAMAGED")
def test_damage_is_named(tmp_path, victim, damage):
    archive = Archive(str(tmp_path))
    make(archive, "c", 1)
    file = tmp_path / "c" / victim
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[0] ^= 1
        file.write_bytes(data if damage == "flip" else data[:-1] if damage == "cut" else data + b"x")
    with pytest.raises(ParameshError, match=victim) as caught:
        archive.manifest("c", verify=True)
    assert caught.value.reason == "DAMAGED"


@pytest.mark.bad_input(58, got="ignored, named")
def test_an_extra_file_is_a_stranger(archive):
    make(archive, "c", 1)
    folder = archive.folder("c")
    with folder._fs.open(f"{folder._place}/extra", "wb") as file:
        file.write(b"?")
    folder.open()
    assert folder.strangers() == ["extra"]


@pytest.mark.bad_input(61, got="FORMAT")
def test_pickles_are_refused(tmp_path):
    import torch

    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(ParameshError, match=r"torch\.save") as caught:
        Folder(tmp_path / "model.pt").open()
    assert caught.value.reason == "FORMAT"


# ---------------------------------------------------------------------- power cuts


class Disk:
    """Stands where files touches the disk: fails or dies at a chosen act, and knows what is durable."""

    def __init__(self, monkeypatch, root):
        self.acts = 0
        self.fail_at = None
        self.error = None
        self.durable = {}
        self.root = root
        self.after = lambda: None
        for name in ("_put", "_sync_file", "_sync_folder", "_rename", "_exchange"):
            monkeypatch.setattr(files, name, self._wrapped(name, getattr(files, name)))

    def _wrapped(self, name, real):
        def act(*arguments):
            self._count()
            done = real(*arguments)
            if name == "_sync_file":
                os_path = os.path.realpath(f"/proc/self/fd/{arguments[0].fileno()}")
                with open(os_path, "rb") as file:
                    self.durable[hashlib.sha256(file.read()).hexdigest()] = True
            self._count()
            return done

        return act

    def _count(self):
        self.acts += 1
        self.after()
        if self.acts == self.fail_at:
            raise self.error

    def image(self, target):
        """The disk after a power cut now: files that were never synced are empty."""
        shutil.copytree(self.root, target, symlinks=True)
        for folder, _, names in os.walk(target):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    digest = hashlib.sha256(file.read()).hexdigest()
                if digest not in self.durable:
                    open(path, "wb").close()


class Killed(BaseException):
    """The process ended here: nothing of it runs any more."""


def acts_of_a_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        root = tmp_path / "count"
        disk = Disk(patch, root)
        make(Archive(str(root)), "x", 1)
        return disk.acts


def test_whenever_the_power_goes_a_loader_finds_a_complete_checkpoint(tmp_path, monkeypatch):
    root = tmp_path / "root"
    archive = Archive(str(root))
    disk = Disk(monkeypatch, root)
    make(archive, "checkpoint-000001", 1)
    images = []

    def cut():
        images.append(tmp_path / f"image-{len(images)}")
        disk.image(images[-1])

    disk.after = cut
    make(archive, "checkpoint-000002", 2)
    disk.after = lambda: None
    assert len(images) > 10
    seen = []
    for image in images:
        complete = Archive(str(image)).complete()
        for manifest in complete:
            Archive(str(image)).manifest(manifest.name, verify=True)
        seen.append([manifest.number for manifest in complete])
    assert seen[0] == [1]
    assert seen[-1] == [1, 2]
    assert all(numbers in ([1], [1, 2]) for numbers in seen)


def test_whenever_the_process_dies_the_next_one_tidies_and_goes_on(tmp_path, monkeypatch):
    for at in range(1, acts_of_a_checkpoint(tmp_path, monkeypatch) + 1):
        root = tmp_path / str(at)
        archive = Archive(str(root))
        make(archive, "checkpoint-000001", 1)
        with monkeypatch.context() as patch:
            disk = Disk(patch, root)
            disk.fail_at, disk.error = at, Killed()
            with pytest.raises(Killed):
                make(archive, "checkpoint-000002", 2)
        found = [manifest.name for manifest in archive.complete()]
        assert found[0] == "checkpoint-000001"
        archive.sweep()
        assert archive.names() == found
        make(archive, f"checkpoint-{archive.next_number():06d}", archive.next_number())
        assert len(archive.complete()) == len(found) + 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_says_no_leaves_nothing(tmp_path, monkeypatch, code):
    for at in range(1, acts_of_a_checkpoint(tmp_path, monkeypatch) - 2):  # the last acts come after the rename
        root = tmp_path / f"{code}-{at}"
        archive = Archive(str(root))
        make(archive, "checkpoint-000001", 1)
        with monkeypatch.context() as patch:
            disk = Disk(patch, root)
            disk.fail_at, disk.error = at, OSError(code, os.strerror(code))
            draft = archive.draft("checkpoint-000002")
            with pytest.raises(ParameshError) as caught:
                write(draft, 2)
            draft.abort()
        assert caught.value.reason == "PATH"
        assert os.strerror(code) in str(caught.value)
        assert next(m.number for m in archive.complete()) == 1
        assert not [name for name in archive.names() if name.endswith(".tmp")]


def test_replacing_is_one_act(tmp_path, monkeypatch):
    """paramesh.save over an older folder: at every moment one of the two is there, whole."""
    root = tmp_path / "root"
    root.mkdir()
    path = root / "c"
    Folder(path).write([("a", b"old")], {"n": 1})
    seen = []

    def look():
        try:
            seen.append(Folder(path).open()["n"])
        except ParameshError:
            seen.append(None)

    disk = Disk(monkeypatch, root)
    disk.after = look
    Folder(path).write([("a", b"new")], {"n": 2})
    assert None not in seen
    assert seen[-1] == 2
    assert os.listdir(root) == ["c"]


def test_where_names_cannot_be_swapped_the_older_one_is_renamed_away(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = tmp_path / "c"
    Folder(path).write([("a", b"old")], {"n": 1})
    Folder(path).write([("a", b"new")], {"n": 2})
    assert Folder(path).open()["n"] == 2
    assert os.listdir(tmp_path) == ["c"]


def test_on_an_object_store_the_manifest_is_the_commit():
    url = f"memory://{uuid.uuid4()}/c"
    draft = Draft(url, "")
    draft.begin()
    entry = draft.put("a", [b"x"])
    assert entry == Entry(1, hashlib.sha256(b"x").hexdigest())
    with pytest.raises(ParameshError) as caught:
        Folder(url).open()
    assert caught.value.reason == "NOT_FOUND"
    draft.commit({"n": 1}, {"a": entry})
    assert Folder(url).open()["n"] == 1
    fs, place = fsspec.core.url_to_fs(url)
    assert sorted(p.rpartition("/")[2] for p in fs.ls(place, detail=False)) == ["MANIFEST.json", "a"]


def test_what_is_given_up_goes_although_another_process_still_writes_into_it(tmp_path, monkeypatch):
    """A server's last file arrives while the coordinator takes the folder apart: it must find no folder."""
    draft = Archive(str(tmp_path)).draft("late")
    draft.begin()
    draft.put("one.bin", [b"1"])
    real, tried = os.rmdir, []

    def rmdir(*arguments, **how):
        tried.append(arguments)
        with contextlib.suppress(OSError):
            (tmp_path / "late.tmp" / "two.bin").write_bytes(b"2")
        return real(*arguments, **how)

    monkeypatch.setattr(os, "rmdir", rmdir)
    draft.abort()
    assert tried, "nothing was taken apart"
    assert os.listdir(tmp_path) == []
