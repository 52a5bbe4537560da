"""Joining, waiting, leaving; and alone, where nothing is started."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import paramesh
import pytest
from paramesh import waiting
from paramesh.config import ClientConfig
from paramesh.errors import ConfigError, Fenced, StateRefused, Timeout
from paramesh.membership import Session
from paramesh.session import current, using
from paramesh.v1 import ledger_pb2 as lg
from pure_cluster import PureCluster, Trainer


def python(code, **environ):
    """Run a script of its own; returns the completed process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PARAMESH_")} | environ
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, env=env
    )


# ---------------------------------------------------------------------- alone


def test_alone_everything_works_and_nothing_is_started():
    run = python(
        """
        import os, threading, torch, paramesh
        def sockets():
            links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                     if os.path.islink(f"/proc/self/fd/{fd}")]
            return [l for l in links if l.startswith("socket:")]
        before = (threading.active_count(), sockets())
        model = torch.nn.Linear(3, 1)
        data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.randn(20, 1))
        loader = paramesh.DataLoader(data, batch_size=4, shuffle=True, seed=1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = paramesh.DistributedOptimizer(inner, model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        paramesh.state(scheduler=scheduler)
        assert not paramesh.init()
        assert (paramesh.rank(), paramesh.world_size(), paramesh.is_chief()) == (0, 1, True)
        with paramesh.profile() as profile:
            for epoch in paramesh.epochs(2):
                for x, y in paramesh.progress(loader):
                    optimizer.zero_grad(); (model(x) - y).square().mean().backward(); optimizer.step()
                    paramesh.report(loss=1.0)
        paramesh.barrier(); paramesh.assign(model); paramesh.broadcast(model)
        with paramesh.pause():
            assert paramesh.mean({"a": 1, "b": torch.ones(2)})["a"] == 1
        paramesh.device()
        paramesh.shutdown()
        assert (threading.active_count(), sockets()) == before
        import sys
        assert "grpc" not in sys.modules, "gRPC was imported for nothing"
        """
    )
    assert run.returncode == 0, run.stderr


def test_alone_the_loader_is_torchs_own():
    import torch

    data = torch.utils.data.TensorDataset(torch.arange(8))
    with using(None):
        batches = iter(paramesh.DataLoader(data, batch_size=2))
    assert type(batches).__module__.startswith("torch.")


# ---------------------------------------------------------------------- which session


def test_using_overrides_for_this_thread_only():
    cluster = PureCluster()
    session = cluster.session()
    seen = []
    with using(session):
        assert current() is session
        thread = threading.Thread(target=lambda: seen.append(_alone_or(session)))
        thread.start()
        thread.join()
        with using(None):
            assert current() is None
            assert not paramesh.init()
        assert paramesh.init()
    assert seen == ["not this session"]


def _alone_or(session):
    with using(None) if "PARAMESH_COORDINATOR" in os.environ else contextlib.nullcontext():
        return "this session" if current() is session else "not this session"


def test_joining_needs_a_coordinator():
    with pytest.raises(ConfigError, match="PARAMESH_COORDINATOR"):
        Session.join(ClientConfig())


def test_a_wrong_environment_is_named_at_first_use():
    run = python("import paramesh; paramesh.rank()", PARAMESH_COORDINATOR="nonsense")
    assert run.returncode != 0
    assert "PARAMESH_COORDINATOR" in run.stderr


def test_a_cluster_that_does_not_answer_is_named():
    run = python(
        """
        import time, paramesh
        began = time.monotonic()
        try:
            paramesh.init("127.0.0.1:1")
        except paramesh.errors.Unavailable as error:
            assert "127.0.0.1:1" in str(error), error
            assert time.monotonic() - began < 20
        else:
            raise SystemExit("joined nothing")
        """,
        PARAMESH_JOIN_TIMEOUT="1",
    )
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------------- waiting


async def never():
    import asyncio

    await asyncio.Event().wait()


def test_call_returns_raises_and_times_out():
    session = PureCluster().session()

    async def value():
        return 42

    async def fails():
        raise TimeoutError("of the coroutine's own")

    assert session.call(value(), "a value") == 42
    with pytest.raises(TimeoutError, match="own"):
        session.call(fails(), "a failure", timeout=5)
    with pytest.raises(Timeout, match=r"0\.05 s for nothing") as caught:
        session.call(never(), "nothing", timeout=0.05)
    assert caught.value.reason == "DEADLINE"


def test_a_long_wait_names_who_is_waited_for(caplog):
    cluster = PureCluster(start_workers=2)
    one, two = cluster.session("host-a/0", 0), cluster.session("host-b/0", 1)
    trainers = {}

    def enter(session):
        trainers[session] = Trainer(session)
        session.ensure_active()

    threads = [threading.Thread(target=enter, args=(s,)) for s in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    request = lg.ReadyRequest(group=trainers[one].group, step=0, attempt=1, weight=1.0)
    future = one.submit(one.client.ledger.ready(request))
    with caplog.at_level(logging.WARNING, "paramesh.waiting"), pytest.raises(Timeout):
        waiting.wait(future, "step 0", 0.4, one._who, patience=0.1)
    assert "rank 1 (host-b/0)" in caplog.text
    assert "'step 0'" in caplog.text


def test_ctrl_c_cancels_what_was_waited_for():
    session = PureCluster().session()
    state = {}

    async def watched():
        import asyncio

        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            state["cancelled"] = True
            raise

    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        session.call(watched(), "Ctrl-C")
    deadline = time.monotonic() + 5
    while not state and time.monotonic() < deadline:
        session.call(_nothing(), "a turn of the loop")
    assert state == {"cancelled": True}


async def _nothing():
    return None


def test_use_in_a_forked_child_is_refused_and_leaving_there_is_harmless():
    cluster = PureCluster()
    session = cluster.session()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert session.rank == 0  # what is known without asking may be read
            session.leave()
            session.call(_nothing(), "nothing")
        except StateRefused as error:
            code = 0 if error.reason == "FORKED" and "DataLoader" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not session.closed
    assert [m for _, m in cluster.calls] == ["join"]


# ---------------------------------------------------------------------- activity


def test_participants_hear_of_activity_before_the_caller_goes_on():
    cluster = PureCluster()
    session = cluster.session()
    events = []

    class Part:
        def on_active(self, positions):
            events.append(("active", session.active))

        def on_rejoined(self):
            events.append(("rejoined", session.membership))

        def drain(self):
            events.append(("drained", session.closed))

    part = Part()
    session.register(part)
    assert not session.active
    session.ensure_active()
    session.ensure_active()
    session.set_between()
    session.set_between()
    session.ensure_active()
    session.rejoin()
    session.leave()
    assert [e[0] for e in events] == ["active", "active", "rejoined", "drained"]
    assert [m for _, m in cluster.calls].count("set_activity") == 3
    del part
    assert session.participants() == []


def test_a_participant_that_fails_leaves_the_activity_open():
    session = PureCluster().session()

    class Broken:
        def on_active(self, positions):
            raise ValueError("no")

    broken = Broken()
    session.register(broken)
    with pytest.raises(ValueError, match="no"):
        session.ensure_active()
    assert not session.active
    del broken
    session.ensure_active()
    assert session.active


def test_pause_is_idle_until_the_next_batch_or_the_blocks_end():
    cluster = PureCluster()
    session = cluster.session()

    def activity():
        return cluster.ledger.status(0.0).members[0].activity

    with using(session):
        session.ensure_active()
        with paramesh.pause():
            assert activity() == lg.ACTIVITY_IDLE
        assert activity() == lg.ACTIVITY_BETWEEN
        paramesh.pause()
        assert activity() == lg.ACTIVITY_IDLE
        session.ensure_active()
        assert activity() == lg.ACTIVITY_ACTIVE


# ---------------------------------------------------------------------- leaving, eviction


def test_leaving_says_goodbye_once_and_closes():
    cluster = PureCluster()
    session = cluster.session()
    session.leave()
    session.leave()
    assert [m for _, m in cluster.calls] == ["join", "leave"]
    assert session.client.closed
    assert session.client.deregistered
    with pytest.raises(StateRefused, match=r"paramesh\.init"):
        session.ensure_active()


def test_a_crash_only_closes():
    cluster = PureCluster()
    session = cluster.session()
    session.leave(gracefully=False)
    assert [m for _, m in cluster.calls] == ["join"]
    assert session.client.closed
    assert not session.client.deregistered


@pytest.mark.parametrize(
    ("ending", "calls"),
    [
        ("pass", ["join", "leave"]),
        ("sys.exit(0)", ["join", "leave"]),
        ("raise ValueError('a bug')", ["join"]),
        ("os._exit(3)", ["join"]),
    ],
)
def test_only_a_clean_exit_leaves_gracefully(ending, calls, tmp_path):
    log = tmp_path / "calls"
    run = python(
        f"""
        import os, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pure_cluster import PureCluster
        import paramesh.membership
        cluster = PureCluster()
        class Calls(list):
            def append(self, call):
                with open({str(log)!r}, "a") as file:
                    file.write(call[1] + "\\n")
        cluster.calls = Calls()
        paramesh.membership.Session.join = classmethod(lambda cls, config: cluster.session())
        import paramesh
        assert paramesh.rank() == 0
        {ending}
        """,
        PARAMESH_COORDINATOR="pure:1",
    )
    assert log.read_text().split() == calls, run.stderr


def test_rejoin_is_a_new_client_of_the_same_slot_and_rank():
    cluster = PureCluster()
    cluster.session("pure/0", 0)
    session = cluster.session("pure/1", 1)
    old = session.client
    session.deliveries.delivered(None, 3)
    cluster.evict(session)
    with pytest.raises(Fenced):
        session.call(session.client.ledger.set_activity(lg.SetActivityRequest(activity=1)), "activity")
    session.ensure_active()  # `request` rejoins by itself
    assert session.client.client_id > old.client_id
    assert (session.rank, session.membership) == (1, 2)
    members = cluster.ledger.status(0.0).members
    assert sorted((m.rank, m.slot) for m in members) == [(0, "pure/0"), (1, "pure/1")]


def test_after_shutdown_the_process_must_join_again():
    run = python(
        f"""
        import os, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pure_cluster import PureCluster
        import paramesh, paramesh.membership
        cluster = PureCluster()
        paramesh.membership.Session.join = classmethod(lambda cls, config: cluster.session())
        assert paramesh.init()
        paramesh.shutdown()
        try:
            paramesh.barrier()
        except paramesh.errors.StateRefused as error:
            assert error.reason == "NOT_MEMBER", error
        else:
            raise SystemExit("a barrier without a cluster")
        assert paramesh.init()
        paramesh.barrier()
        """,
        PARAMESH_COORDINATOR="pure:1",
    )
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------------- SIGTERM


def sigterm_script(body):
    return f"""
        import os, signal, sys, time
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pure_cluster import PureCluster, Trainer
        import paramesh, paramesh.membership, torch
        from paramesh.session import current
        cluster = PureCluster()
        paramesh.membership.Session.join = classmethod(lambda cls, config: cluster.session())
        import atexit
        session = current()
        def report():
            status = cluster.ledger.status(0.0)
            print("members", len(status.members), "left", [m for _, m in cluster.calls].count("leave"))
            print("returned", [m for _, m in cluster.calls].count("return_leases"))
        atexit._clear()
        atexit.register(report)
        atexit.register(lambda: session.leave())
        data = torch.utils.data.TensorDataset(torch.arange(100))
        def die(): os.kill(os.getpid(), signal.SIGTERM)
        {textwrap.indent(textwrap.dedent(body), " " * 8).strip()}
        print("went on")
        """


@pytest.mark.parametrize(
    ("body", "returned"),
    [
        ("die()", 0),
        (
            """
            trainer = Trainer(session)
            for number, _ in enumerate(paramesh.DataLoader(data, 2, num_workers=1)):
                with session.departure.undisturbed():
                    if number == 3:
                        die()
                    trainer.step()
                    print("stepped", number)
            """,
            1,
        ),
    ],
)
def test_sigterm_leaves_gracefully_after_the_step(body, returned):
    run = python(sigterm_script(body), PARAMESH_COORDINATOR="pure:1")
    assert run.returncode == 0, run.stderr
    assert "went on" not in run.stdout
    assert run.stdout.count("stepped") == (4 if returned else 0)
    assert "members 0 left 1" in run.stdout
    assert f"returned {returned}" in run.stdout


def test_a_second_sigterm_kills():
    body = """
    with session.departure.undisturbed():
        die()
        die()
    """
    run = python(sigterm_script(body), PARAMESH_COORDINATOR="pure:1")
    assert run.returncode == -signal.SIGTERM


def test_a_scripts_own_sigterm_handler_stays():
    run = python(
        f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pure_cluster import PureCluster
        import paramesh.membership
        cluster = PureCluster()
        paramesh.membership.Session.join = classmethod(lambda cls, config: cluster.session())
        signal.signal(signal.SIGTERM, lambda *_: print("mine"))
        assert paramesh.init()
        os.kill(os.getpid(), signal.SIGTERM)
        """,
        PARAMESH_COORDINATOR="pure:1",
    )
    assert run.stdout.strip() == "mine"
    assert run.returncode == 0, run.stderr


def test_participants_can_still_call_while_they_drain():
    cluster = PureCluster()
    session = cluster.session()
    drained = []

    class Part:
        def drain(self):
            session.call(_nothing(), "what was pushed")
            drained.append(True)

    part = Part()
    session.register(part)
    session.leave()
    assert drained == [True]
    assert [m for _, m in cluster.calls][-1] == "leave"
    del part
