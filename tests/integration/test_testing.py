"""`paramesh.testing.Cluster`, as its users meet it."""

from __future__ import annotations

import threading

import paramesh
import pytest
import torch
from paramesh import testing
from paramesh.errors import ConfigError, ParameshError, PartitionOffline

from tests.cluster import inspection
from tests.cluster.waiting import wait_until


def one_step(rank: int) -> float:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model)
    model.weight.grad = torch.full((1, 1), -1.0 * (rank + 1))
    optimizer.step()
    return float(model.weight.detach())


def test_results_come_in_rank_order():
    with testing.Cluster(servers=2, workers=3) as cluster:
        assert cluster.run(lambda rank: (rank, paramesh.rank(), paramesh.world_size())) == [
            (0, 0, 3), (1, 1, 3), (2, 2, 3),
        ]  # fmt: skip
        assert cluster.run(one_step) == [2.0, 2.0, 2.0]


def test_the_first_exception_comes_out_with_its_worker_named():
    """The others wait in a step that can never complete; they are ended, and quickly."""

    def train(rank: int) -> float:
        if rank == 1:
            raise ZeroDivisionError("mine")
        return one_step(rank)

    with testing.Cluster(workers=3) as cluster:
        with pytest.raises(ZeroDivisionError, match="mine") as failed:
            cluster.run(train, deadline=20)
        assert failed.value.__notes__ == ["in worker 1 of paramesh.testing.Cluster"]
    assert not [t.name for t in threading.enumerate() if t.name.startswith("paramesh-testing")]


def test_a_worker_that_is_still_joining_when_another_fails_is_ended_too(monkeypatch):
    from paramesh.membership import Session

    failed, join = threading.Event(), Session.join

    def slow_join(config):
        if config.rank == 1:
            assert failed.wait(20), "the other worker fails first"
        return join(config)

    def train(rank: int) -> float:
        if rank == 0:
            threading.Timer(0.2, failed.set).start()  # the run is being abandoned by then
            raise ZeroDivisionError("mine")
        return one_step(rank)

    monkeypatch.setattr(Session, "join", slow_join)
    with testing.Cluster(workers=2) as cluster:
        with pytest.raises(ZeroDivisionError, match="mine"):
            cluster.run(train, deadline=20)
        assert not [t.name for t in threading.enumerate() if t.name.startswith("paramesh-testing")]


def test_a_hang_says_where_each_worker_stands():
    release = threading.Event()

    def train(rank: int) -> None:
        if rank == 0:
            release.wait(30)

    with testing.Cluster(workers=2) as cluster:
        with pytest.raises(ParameshError, match=r"(?s)paramesh-testing-0 is at:.*release\.wait") as failed:
            cluster.run(train, deadline=1.0)
        assert failed.value.reason == "DEADLINE"
        release.set()


def test_a_cluster_can_be_used_again_and_several_at_once():
    with testing.Cluster(workers=2) as one, testing.Cluster(workers=1, job="second") as two:
        assert one.run(one_step) == [1.5, 1.5]
        assert two.run(one_step) == [1.0]
        assert one.address != two.address


def test_killing_a_server_is_noticed():
    def train(rank: int) -> None:
        for _ in range(10_000):
            one_step(rank)

    with testing.Cluster(servers=1, workers=1, failure_timeout=0.4, heartbeat_interval=0.1) as cluster:
        timer = threading.Timer(0.5, cluster.kill_server, [0])
        timer.start()
        with pytest.raises(PartitionOffline, match="server-0"):
            cluster.run(train, deadline=20)


def test_restarting_the_coordinator_keeps_the_job():
    with testing.Cluster(servers=1, workers=2) as cluster:
        before = cluster.run(one_step)
        cluster.restart_coordinator()
        with cluster.client() as client:
            assert client.tables()
        assert before == [1.5, 1.5]


def test_an_idle_tool_is_not_taken_for_dead():
    """A client of `connect` beats: it may push after a pause longer than the client timeout."""
    with testing.Cluster(client_timeout=1.0, failure_timeout=1.0, heartbeat_interval=0.2) as cluster:
        tool = cluster.client()
        tool.create_table("t", {"w": torch.zeros(2)}, "SGD", {"lr": 1.0})
        wait_until(lambda: inspection.status(cluster.address).uptime_ms > 3500, 30, "three client timeouts")
        tool.push("t", {"w": torch.ones(2)})
        assert tool.pull("t")["w"].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"servers": 0}, "servers"), ({"workers": 0}, "workers"), ({"no_such_setting": 1}, "no_such_setting"),
     ({"failure_timeout": 0.01}, "heartbeat_interval")],
)  # fmt: skip
def test_wrong_settings_are_named(arguments, named):
    with pytest.raises(ConfigError, match=named):
        testing.Cluster(**arguments).start()
