"""Checkpoints in a bucket: moto's server stands for S3; the manifest, written last, is the commit."""

import uuid

import pytest
from paramesh.archive import Archive
from paramesh.errors import ParameshError

from tests.integration.test_cluster_checkpoints import goes_on, trained

s3fs = pytest.importorskip("s3fs", reason="s3fs and moto[server] are in the dev extra")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture
def bucket(monkeypatch):
    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"runs-{uuid.uuid4().hex}"  # moto keeps its buckets over servers
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}/one"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_run_goes_on_from_a_bucket(bucket):
    with trained(bucket, 7) as (_, name, values, losses):
        pass
    archive = Archive(bucket)
    assert archive.names() == [name]
    assert archive.manifest(name, verify=True).name == name
    goes_on(bucket, name, 2, losses, values)


def test_an_unfinished_one_does_not_exist_and_damage_is_found(bucket):
    with trained(bucket, 7) as (_, name, _, _):
        pass
    archive = Archive(bucket)
    draft = archive.draft("half")
    draft.begin()
    draft.put("ledger.bin", [b"x"])
    assert [m.name for m in archive.complete()] == [name]
    with pytest.raises(ParameshError) as caught:
        archive.manifest("half")
    assert caught.value.reason == "NOT_FOUND"
    with s3fs.S3FileSystem().open(f"{bucket}/{name}/ledger.bin", "wb") as file:
        file.write(b"something else")
    with pytest.raises(ParameshError, match=r"ledger\.bin") as caught:
        archive.manifest(name, verify=True)
    assert caught.value.reason == "DAMAGED"
    archive.remove(name)
    assert archive.complete() == []
