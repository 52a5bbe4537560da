"""Failpoints: inert without the environment, exact with it."""

import errno
import os
import signal
import subprocess
import sys
import threading

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


def test_a_folder_is_looked_at_each_time(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, f"@{tmp_path}")
    reach("a", "x")
    failpoints.file_of(tmp_path, "a/x").write_text("EROFS\n")
    reach("a")
    reach("a", "y")
    with pytest.raises(OSError, match="failpoint"):
        reach("a", "x")
    failpoints.file_of(tmp_path, "a").write_text("EIO")
    with pytest.raises(OSError, match="failpoint"):
        reach("a", "y")


@pytest.mark.parametrize("said", ["a", "a=quit", "=exit", "a=exit,b=ENOTHING", "a=hang"])
def test_a_misspelt_point_is_an_error(said):
    with pytest.raises(ValueError, match=VARIABLE):
        failpoints.check(said)


def test_a_misspelt_file_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, f"@{tmp_path}")
    failpoints.file_of(tmp_path, "a").write_text("quit")
    with pytest.raises(ValueError, match=VARIABLE):
        reach("a")


def test_a_thread_hangs_until_the_file_goes(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, f"@{tmp_path}")
    file = failpoints.file_of(tmp_path, "a")
    file.write_text("hang")
    thread = threading.Thread(target=reach, args=("a",), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    file.unlink()
    thread.join(10)
    assert not thread.is_alive()


def test_a_kill_takes_its_file_along(tmp_path):
    failpoints.file_of(tmp_path, "a").write_text("kill")
    command = [sys.executable, "-c", "from paramesh.failpoints import reach; reach('a')"]
    done = [subprocess.run(command, env={**os.environ, VARIABLE: f"@{tmp_path}"}, timeout=60) for _ in range(2)]
    assert [one.returncode for one in done] == [-signal.SIGKILL, 0]


def test_exit_runs_nothing_more():
    code = "import atexit\nfrom paramesh.failpoints import reach\natexit.register(print, 'late')\n"
    code += "try:\n reach('a')\nfinally:\n print('late')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, VARIABLE: "a=exit"}, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (EXIT, b"")
