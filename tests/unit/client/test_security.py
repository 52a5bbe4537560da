"""Security settings: what belongs together, what is refused, and files that change."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest
import trustme
from paramesh import credentials
from paramesh.certificates import check_pair, issue, make_authority, read_certificate
from paramesh.config import ClientConfig
from paramesh.credentials import Bearer, Followed
from paramesh.errors import ConfigError
from paramesh.identity import Identity, Role
from paramesh.security import PLAIN, Security
from paramesh.tokens import TokenKeys

ME = Identity("default", Role.WORKER, "me")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_authority(tmp_path, 10)
    return tmp_path


def settings(folder: Path, who: Identity = ME, days: float = 1) -> Security:
    files = issue(folder, who, ["127.0.0.1", "host.example"], days)
    return Security(str(files.cert), str(files.key), str(folder / "ca.pem"))


def refusal(security: Security, role: Role | None = None, job: str = "") -> str:
    with pytest.raises(ConfigError) as refused:
        security.check(role, job)
    return str(refused.value)


def keys_file(folder: Path) -> tuple[TokenKeys, str]:
    keys, path = TokenKeys.fresh(), folder / "keys"
    path.write_text(keys.text())
    path.chmod(0o600)
    return keys, str(path)


def test_a_certificate_says_who_it_is_of(folder: Path) -> None:
    assert settings(folder).check(Role.WORKER, "default") == ME
    assert PLAIN.check() is None


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
def test_all_three_or_none(folder: Path, missing: str) -> None:
    said = refusal(dataclasses.replace(settings(folder), **{missing: ""}))
    assert said.startswith(f"tls_{missing}: is missing")
    assert f"PARAMESH_TLS_{missing.upper()}" in said


def test_variables_are_checked_when_they_are_read(folder: Path) -> None:
    right = settings(folder).environment()
    assert ClientConfig.from_environment(right).security == settings(folder)
    del right["PARAMESH_TLS_KEY"]
    with pytest.raises(ConfigError, match="PARAMESH_TLS_KEY"):
        ClientConfig.from_environment(right)


def test_a_key_that_others_may_read_is_refused(folder: Path) -> None:
    security = settings(folder)
    assert os.stat(security.key).st_mode & 0o777 == 0o600
    for mode in (0o640, 0o604, 0o644, 0o660):
        os.chmod(security.key, mode)
        assert f"mode {mode:04o}" in refusal(security)


def test_wrong_certificates_are_named(folder: Path, tmp_path: Path) -> None:
    good = settings(folder)
    other = issue(folder, dataclasses.replace(ME, name="other"), [], 1)
    assert "not the certificate's" in refusal(dataclasses.replace(good, key=str(other.key)))
    assert "expired" in refusal(settings(folder, dataclasses.replace(ME, name="late"), days=0))
    assert "is of a worker" in refusal(good, Role.SERVER)
    assert "--job" in refusal(good, Role.WORKER, "another")
    assert "cannot be read" in refusal(dataclasses.replace(good, cert=str(tmp_path / "none.pem")))
    (tmp_path / "empty.pem").write_text("nothing")
    assert refusal(dataclasses.replace(good, ca=str(tmp_path / "empty.pem"))).startswith("tls_cert: ")


def test_a_certificate_without_a_name_of_ours_is_refused(tmp_path: Path) -> None:
    ca = trustme.CA()
    leaf = ca.issue_cert("host.example")
    for name, blob in (("c", leaf.cert_chain_pems[0]), ("k", leaf.private_key_pem), ("ca", ca.cert_pem)):
        blob.write_to_path(str(tmp_path / name))
    os.chmod(tmp_path / "k", 0o600)
    assert "spiffe://paramesh/" in refusal(Security(*(str(tmp_path / name) for name in ("c", "k", "ca"))))


def test_servers_need_a_host_and_only_they_may_be_dialled(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^host: is needed"):
        issue(folder, Identity("j", Role.SERVER, "s"), [], 1)
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    for role in Role:
        pem = issue(folder, Identity("j", role, "n"), ["127.0.0.1"], 1).cert.read_bytes()
        uses = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert (ExtendedKeyUsageOID.SERVER_AUTH in uses) == (role in (Role.SERVER, Role.COORDINATOR))


def test_a_ca_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(ConfigError, match="holds a CA"):
        make_authority(folder, 1)


def test_tokens_stay_off_the_wire_in_the_clear(folder: Path) -> None:
    keys, path = keys_file(folder)
    bearer = Security(token=keys.sign(ME, time.time() + 60))
    bearer.check_dial("127.0.0.1:1")
    with pytest.raises(ConfigError, match="unencrypted"):
        bearer.check_dial("10.0.0.1:1")
    dataclasses.replace(bearer, ca="ca.pem").check_dial("10.0.0.1:1")
    with pytest.raises(ConfigError, match=r"^token_keys"):
        Security(token_keys=path).check_bind("bind", "0.0.0.0:1", insecure=True)
    with pytest.raises(ConfigError, match=r"^bind: .*--insecure"):
        PLAIN.check_bind("bind", "0.0.0.0:1", insecure=False)
    PLAIN.check_bind("bind", "0.0.0.0:1", insecure=True)
    settings(folder).check_bind("bind", "0.0.0.0:1", insecure=False)


def test_tokens_and_keys_go_where_they_belong(folder: Path) -> None:
    keys, path = keys_file(folder)
    token = keys.sign(ME, time.time() + 60)
    assert Security(token=token).check(Role.WORKER, "default") == ME
    assert token not in repr(Security(token=token))
    assert "token_keys" in refusal(Security(token_keys=path), Role.WORKER)
    assert "exclude" in refusal(Security(token=token, token_file=path))
    assert "no token" in refusal(Security(token="x"))
    assert "is of a worker" in refusal(Security(token=token), Role.ADMIN)
    (folder / "open").write_text(token)
    os.chmod(folder / "open", 0o644)
    assert "mode 0644" in refusal(Security(token_file=str(folder / "open")))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "LOOK_S", -1.0)


@pytest.mark.usefixtures("at_once")
def test_half_of_a_rotation_is_not_taken_up(folder: Path) -> None:
    security = settings(folder)
    followed = Followed(security)
    before = followed.material()
    key = Path(security.key)
    old_key = key.read_bytes()
    settings(folder)  # both are new
    new_key = key.read_bytes()
    key.write_bytes(old_key)
    assert (followed.material(), followed.version) == (before, 1)
    key.write_bytes(new_key)
    assert followed.version == 1
    cert, _, _ = followed.material()
    assert (cert != before[0], followed.version) == (True, 2)
    assert read_certificate(cert).identity == ME
    check_pair(*followed.material())


@pytest.mark.usefixtures("at_once")
def test_a_token_is_read_again_and_a_missing_one_kept(folder: Path) -> None:
    keys, _ = keys_file(folder)
    path = folder / "token"
    path.touch(0o600)
    first, second = (keys.sign(ME, time.time() + seconds) for seconds in (60, 120))
    path.write_text(first)
    bearer = Bearer(Security(token_file=str(path)))
    assert bearer.metadata() == (("authorization", f"Bearer {first}"),)
    path.write_text(second + "\n\n")
    assert bearer.metadata() == (("authorization", f"Bearer {second}"),)
    path.unlink()
    assert bearer.metadata() == (("authorization", f"Bearer {second}"),)


@pytest.mark.usefixtures("at_once")
def test_who_has_the_keys_signs_for_itself(folder: Path) -> None:
    keys, path = keys_file(folder)
    server = Identity("default", Role.SERVER, "s0")
    bearer = Bearer(Security(token_keys=path, signs_as=server))
    ((_, first),) = bearer.metadata()
    assert keys.verify(first.removeprefix("Bearer "), time.time())[0] == server
    assert bearer.metadata() == (("authorization", first),)
    rotated = TokenKeys.fresh(keys)
    Path(path).write_text(rotated.text())
    ((_, second),) = bearer.metadata()
    assert rotated.verify(second.removeprefix("Bearer "), time.time())[0] == server
    assert second != first
