"""`psctl certs` and `psctl tokens`: what they write, and what they say of mistakes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from paramesh.identity import Identity, Role
from paramesh.security import Security
from paramesh.tokens import TokenKeys
from paramesh_coordinator import psctl
from typer.testing import CliRunner


def said(*words: str, status: int = 0) -> str:
    done = CliRunner().invoke(psctl.app, words)
    assert done.exit_code == status, done.output
    return done.output


def issue(folder: Path, *words: str, status: int = 0) -> str:
    return said("certs", "issue", str(folder), *words, status=status)


def test_a_ca_and_a_certificate_in_one_command_each(tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    said("certs", "init", str(folder))
    text = issue(folder, "--role", "server", "--name", "s0", "--host", "10.0.0.2", "--host", "s0.example", "--job", "j")
    assert "spiffe://paramesh/j/server/s0" in text
    files = Security(str(folder / "server-s0.pem"), str(folder / "server-s0.key"), str(folder / "ca.pem"))
    assert files.check(Role.SERVER, "j") == Identity("j", Role.SERVER, "s0")
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "ca.key": 0o600, "ca.pem": 0o644, "server-s0.key": 0o600, "server-s0.pem": 0o644,
    }  # fmt: skip
    assert folder.stat().st_mode & 0o777 == 0o700


def test_mistakes_are_named(tmp_path: Path) -> None:
    assert "psctl certs init" in issue(tmp_path, "--role", "admin", "--name", "a", status=2)
    said("certs", "init", str(tmp_path))
    assert "holds a CA" in said("certs", "init", str(tmp_path), status=2)
    assert "host: is needed" in issue(tmp_path, "--role", "server", "--name", "s", status=2)
    assert "a/b" in issue(tmp_path, "--role", "worker", "--name", "a/b", status=2)
    assert "root" in issue(tmp_path, "--role", "root", "--name", "a", status=2)


def test_tokens_are_issued_under_the_newest_of_two_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    said("tokens", "keys", str(file))
    words = ("tokens", "issue", "--keys", str(file), "--role", "worker", "--name", "w")
    old = said(*words).strip()
    assert "2 of at most 2 keys" in said("tokens", "keys", str(file))
    said(*words, "--hours", "24", "--out", str(tmp_path / "token"))
    new = (tmp_path / "token").read_text().strip()
    keys = TokenKeys.parse(file.read_text())
    for token in (old, new):
        assert keys.verify(token, time.time())[0] == Identity("default", Role.WORKER, "w")
    assert [path.stat().st_mode & 0o777 for path in (file, tmp_path / "token")] == [0o600, 0o600]
    said(*words, "--hours", "25", status=2)


@pytest.mark.parametrize("variable", ["PARAMESH_TLS_CERT", "PARAMESH_TLS_KEY"])
def test_half_of_the_files_is_a_mistake(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "x.pem")
    assert "belong together" in said("status", status=2)
