"""`ps-worker` and its coordinator: beats, losses, returns, refusals."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paramesh.v1 import coordinator_pb2 as pb

from tests.cluster.waiting import wait_until
from tests.integration import recording
from tests.integration.recording import FOREVER, START_S, Recorder, serve

recorder, start_ps_worker = recording.recorder, recording.start_ps_worker


def test_beats_echo_the_last_answer(start_ps_worker, recorder: Recorder):
    start_ps_worker(FOREVER)
    wait_until(lambda: len(recorder.beats) > 20, START_S, "20 beats")
    beats = recorder.beats[:20]
    assert beats[0].echo == 0
    assert {(beat.name, beat.kind, beat.request.generation) for beat in beats} == {("host-a", pb.NODE_KIND_HOST, 5)}
    echoes = [beat.echo for beat in beats[1:]]
    assert set(echoes[3:]) <= set(recorder.nonces), "each echo is a nonce that was given"
    assert echoes == sorted(echoes)
    assert echoes[-1] > recorder.nonces[10], "and a fresh one"


def test_unknown_to_the_coordinator_it_registers_again(start_ps_worker, recorder: Recorder):
    worker = start_ps_worker(FOREVER)
    wait_until(lambda: recorder.beats, START_S, "beats")
    recorder.forget = True
    wait_until(lambda: len(recorder.registrations) == 2, 10, "the second registration")
    assert recorder.registrations[0] == recorder.registrations[1]
    beats = len(recorder.beats)
    wait_until(lambda: len(recorder.beats) > beats + 5, 10, "beats to go on")
    assert worker.popen.poll() is None


def test_the_coordinator_goes_and_comes_back_and_training_goes_on(start_ps_worker, recorder: Recorder):
    worker = start_ps_worker(FOREVER)
    wait_until(lambda: recorder.beats and worker.hellos(), START_S, "beats")
    recorder.server.stop(None).wait()
    wait_until(lambda: any("coordinator=away" in line for line in worker.err), 10, "the loss to be noticed")
    beats = len(recorder.beats)
    recorder.server, _ = serve(recorder, recorder.port)
    wait_until(lambda: len(recorder.beats) > beats + 5, 10, "beats to go on")
    assert any("coordinator=back" in line for line in worker.err)
    assert len(worker.hellos()) == 1, "the training process was left alone"
    assert len(recorder.registrations) == 1, "it was known; no need to register again"


def test_a_stopped_process_is_reported_when_the_coordinator_is_back(start_ps_worker, recorder: Recorder):
    worker = start_ps_worker(FOREVER)
    wait_until(lambda: recorder.beats and worker.hellos(), START_S, "beats")
    recorder.server.stop(None).wait()
    wait_until(lambda: any("coordinator=away" in line for line in worker.err), 10, "the loss to be noticed")
    os.kill(worker.hellos()[0]["pid"], signal.SIGSTOP)
    recorder.server, _ = serve(recorder, recorder.port)
    wait_until(lambda: recorder.exits, 20, "the report")
    assert [report.exit_code for _, report in recorder.exits] == [-signal.SIGSTOP]
    assert not any("undelivered" in line for line in worker.err), "it is tried again, and that is not news"


def test_a_coordinator_that_stops_to_answer_is_noticed(start_ps_worker, recorder: Recorder):
    """A one-way cut: the connection stands, beats go out, no answers come."""
    worker = start_ps_worker(FOREVER)
    wait_until(lambda: recorder.beats, START_S, "beats")
    silent = threading.Event()

    def swallow(requests: Any, context: Any) -> Iterator[Any]:
        silent.set()
        for _ in requests:
            pass
        yield from ()

    recorder.Heartbeat = swallow  # type: ignore[method-assign]
    recorder.server.stop(None).wait()
    recorder.server, _ = serve(recorder, recorder.port)
    assert silent.wait(10)
    wait_until(
        lambda: any("no answer to heartbeats" in line or "coordinator=away" in line for line in worker.err), 10, "it"
    )
    del recorder.Heartbeat
    recorder.server.stop(None).wait()
    recorder.server, _ = serve(recorder, recorder.port)
    beats = len(recorder.beats)
    wait_until(lambda: len(recorder.beats) > beats + 5, 10, "beats to go on")


def test_its_own_old_name_is_waited_for(start_ps_worker, recorder: Recorder):
    """A supervisor that was killed and started anew finds its name live until the silence is noticed."""
    recorder.refuse_name = 3
    worker = start_ps_worker("")
    assert worker.wait() == 0
    assert len(recorder.registrations) == 4


def test_a_name_that_stays_taken_is_an_error_with_a_remedy(start_ps_worker, recorder: Recorder):
    recorder.refuse_name = 1000
    worker = start_ps_worker("")
    assert worker.wait(30) == 1
    assert "--name" in worker.err[-1]
    assert not worker.hellos()


def test_a_signal_while_looking_for_the_coordinator_ends_it(start_ps_worker, tmp_path: Path):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        worker = start_ps_worker("", options=("--coordinator", address))
        wait_until(lambda: any("waiting for the coordinator" in line for line in worker.err), START_S, "the wait")
        worker.popen.send_signal(signal.SIGINT)
        assert worker.wait(10) == 130
    assert not worker.hellos()


def test_an_unreachable_coordinator_is_an_error_that_names_it(tmp_path: Path):
    script = tmp_path / "t.py"
    script.touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code = (
        "import paramesh_worker.supervisor as s, paramesh_worker.cli as c; s.PATIENCE_S = 0.5;"
        f"c.main(['--coordinator', '127.0.0.1:{port}', {str(script)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"no coordinator answers at 127.0.0.1:{port}" in done.stderr
    assert "ps-coordinator" in done.stderr
