"""What a supervised process tells of the exception that ended it, and how a Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paramesh_worker.last_words import LastWords
from paramesh_worker.restarts import Words

OFFLINE = "import paramesh.errors; raise paramesh.errors.refuse('PARTITION_OFFLINE', 'ps-0 is lost')"


@pytest.fixture
def words() -> Iterator[LastWords]:
    made = LastWords("test")
    yield made
    made.close()


def run(script: str, words: LastWords) -> tuple[subprocess.Popen[str], str]:
    env = os.environ | {"PARAMESH_ERROR_FILE": words.path}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)
    return process, process.communicate(timeout=60)[1]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (OFFLINE, Words("PartitionOffline", "PARTITION_OFFLINE", "ps-0 is lost")),
        ("import paramesh; raise RuntimeError('mine')", Words("RuntimeError", "", "mine")),
        ("import paramesh, no_such", Words("ModuleNotFoundError", "", "No module named 'no_such'", of_the_script=True)),
        ("import paramesh\nclass E(Exception): reason = 'CONFIG'\nraise E('x')", Words("E", "", "x")),
        ("import paramesh, sys; sys.exit(2)", None),
        ("raise RuntimeError('without the library')", None),
    ],
)
def test_the_exception_that_ended_it_is_told_and_its_traceback_stays(script: str, said: Words | None, words: LastWords):
    process, err = run(script, words)
    assert words.read(process.pid) == said
    assert ("Traceback" in err) == ("exit" not in script)


def test_words_of_another_process_do_not_count(words: LastWords):
    process, _ = run(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {OFFLINE!r}])", words)
    assert process.returncode == 0
    assert words.read(process.pid) is None


def test_a_fork_tells_nothing(words: LastWords):
    script = "import os, paramesh\nif os.fork(): os.wait()\nelse: raise RuntimeError('in the fork')"
    process, err = run(script, words)
    assert "in the fork" in err
    assert os.stat(words.path).st_size == 0
    assert words.read(process.pid) is None


def test_forgotten_words_are_gone(words: LastWords):
    process, _ = run(OFFLINE, words)
    words.forget()
    assert words.read(process.pid) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"pid": 1}'])
def test_bytes_that_are_no_words(text: str, words: LastWords):
    Path(words.path).write_text(text)
    assert words.read(1) is None


def test_a_supervisor_that_is_gone_changes_nothing_of_the_end():
    env = os.environ | {"PARAMESH_ERROR_FILE": "/proc/self/fd/987"}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("paramesh.errors.PartitionOffline: ps-0 is lost")


def test_an_interrupt_is_one_line_that_says_where(words: LastWords, tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text("import paramesh, os, signal\n\ndef step():\n    os.kill(os.getpid(), signal.SIGINT)\n\nstep()\n")
    env = os.environ | {"PARAMESH_ERROR_FILE": words.path}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "interrupted at train.py:4\n"
