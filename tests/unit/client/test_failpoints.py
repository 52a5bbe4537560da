"""Failpoints: inert without the environment, exact with it."""

import errno
import os
import subprocess
import sys

import pytest
from paramesh import failpoints
from paramesh.failpoints import EXIT, VARIABLE, reach


def test_nothing_happens_without_the_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    reach("a")


def test_an_errno_is_raised_where_it_was_asked_for_and_nowhere_else(monkeypatch):
    monkeypatch.setenv(VARIABLE, "a.b/ledger.bin=ENOSPC, c=EIO")
    reach("a.b", "other.bin")
    reach("a")
    for name, about, code in (("a.b", "ledger.bin", errno.ENOSPC), ("c", "whatever", errno.EIO)):
        with pytest.raises(OSError, match="failpoint") as caught:
            reach(name, about)
        assert caught.value.errno == code


def test_a_file_is_read_at_each_point(monkeypatch, tmp_path):
    file = tmp_path / "points"
    monkeypatch.setenv(VARIABLE, f"@{file}")
    reach("a")
    file.write_text("a=EROFS\n")
    with pytest.raises(OSError, match="failpoint"):
        reach("a")


@pytest.mark.parametrize("said", ["a", "a=quit", "=exit", "a=exit,b=ENOTHING"])
def test_a_misspelt_point_is_an_error(said):
    with pytest.raises(ValueError, match=VARIABLE):
        failpoints.check(said)


def test_exit_runs_nothing_more():
    code = "import atexit\nfrom paramesh.failpoints import reach\natexit.register(print, 'late')\n"
    code += "try:\n reach('a')\nfinally:\n print('late')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, VARIABLE: "a=exit"}, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (EXIT, b"")
