"""mean, barrier, report, progress, profile, world size: together and alone."""

import io
import math
import sys
import time

import numpy as np
import paramesh
import pytest
import torch
from paramesh import progress_line, reporter
from paramesh.errors import ConfigError, ParameshError
from paramesh.profiling import phase
from paramesh.session import using
from paramesh.v1 import ledger_pb2 as lg
from pure_cluster import PureCluster, Trainer

# ---------------------------------------------------------------------- mean, barrier


def test_mean_of_numbers_tensors_and_dicts():
    cluster = PureCluster(start_workers=3)

    def work(session):
        rank = paramesh.rank()
        plain = paramesh.mean(rank)
        weighted = paramesh.mean(float(rank), weight=rank)
        tensor = paramesh.mean(torch.full((2, 2), rank, dtype=torch.float16))
        counts = paramesh.mean(torch.tensor([rank, 3]))
        table = paramesh.mean({"loss": rank, "hits": torch.tensor([1.0, rank]), "np": np.float32(rank)})
        return plain, weighted, tensor, counts, table

    for plain, weighted, tensor, counts, table in cluster.run(work, 3):
        assert plain == 1.0
        assert weighted == pytest.approx((1 + 4) / 3)
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, torch.ones(2, 2, dtype=torch.float16))
        assert counts.dtype == torch.float32
        assert counts.tolist() == [1.0, 3.0]
        assert list(table) == ["loss", "hits", "np"]
        assert table["loss"] == table["np"] == 1.0
        assert table["hits"].tolist() == [1.0, 1.0]


def test_mean_alone_is_the_value_in_the_same_types():
    with using(None):
        assert paramesh.mean(3) == 3.0
        assert math.isnan(paramesh.mean(math.nan))
        assert paramesh.mean({}) == {}
        tensor = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        assert torch.equal(paramesh.mean(tensor), tensor)
        assert paramesh.mean(torch.tensor(True)).dtype == torch.float32


@pytest.mark.parametrize(
    "value", ["text", None, [1, 2], torch.zeros(1, dtype=torch.complex64), torch.zeros(70_000), {"a": "b"}]
)
def test_what_cannot_be_averaged_is_refused_alone_too(value):
    with using(None), pytest.raises(ConfigError, match="mean"):
        paramesh.mean(value)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf])
def test_a_wrong_weight_is_refused(weight):
    with using(None), pytest.raises(ConfigError, match="weight"):
        paramesh.mean(1.0, weight=weight)


def test_a_barrier_holds_until_the_last_and_lets_go_when_one_dies():
    cluster = PureCluster(start_workers=2)
    passed = []

    def work(session):
        if session.rank == 1:
            deadline = time.monotonic() + 10
            while not any(m == "gather" for _, m in cluster.calls):
                assert time.monotonic() < deadline
            assert passed == []
        paramesh.barrier("start")
        passed.append(session.rank)
        if session.rank == 1:
            cluster.evict(session)
            session.leave(gracefully=False)
            return None
        return paramesh.mean(5.0)

    assert cluster.run(work, 2) == [5.0, None]
    assert sorted(passed) == [0, 1]


@pytest.mark.parametrize("name", ["two words", "a\n", "x" * 300])
def test_a_wrong_name_is_refused_alone_too(name):
    with using(None):
        for act in (
            lambda: paramesh.barrier(name),
            lambda: paramesh.mean(1, name=name),
            lambda: paramesh.DataLoader(torch.utils.data.TensorDataset(torch.arange(2)), name=name),
        ):
            with pytest.raises(ParameshError) as caught:
                act()
            assert caught.value.reason == "NAME"


def test_barriers_of_different_names_do_not_meet():
    cluster = PureCluster(start_workers=2)

    def work(session):
        for name in ("a", "b"):
            paramesh.barrier(name)
        return dict(session.rounds)

    assert cluster.run(work, 2) == [{"barrier:a": 1, "barrier:b": 1}] * 2


# ---------------------------------------------------------------------- who is there


def test_world_size_is_what_the_job_starts_with_until_it_begins():
    cluster = PureCluster(start_workers=3, gather_ms=0)
    session = cluster.session()
    with using(session):
        assert paramesh.world_size() == 3
        assert paramesh.is_chief()
    cluster.run(lambda s: Trainer(s).step(), 2)  # with the first, that is three: step 0 may go
    session.roster._asked_at = -math.inf
    with using(session):
        Trainer(session).step()
        session.roster._asked_at = -math.inf
        assert paramesh.world_size() == 1


def test_the_lowest_living_rank_is_chief():
    cluster = PureCluster(start_workers=2)
    zero, one = cluster.session("pure/0", 0), cluster.session("pure/1", 1)
    with using(one):
        assert not paramesh.is_chief()
        cluster.evict(zero)
        one.roster._asked_at = -math.inf
        assert paramesh.is_chief()
    zero.leave(gracefully=False)


def test_len_is_an_even_share():
    cluster = PureCluster(start_workers=2)
    data = torch.utils.data.TensorDataset(torch.arange(9))
    assert cluster.run(lambda s: len(paramesh.DataLoader(data, 2)), 2) == [3, 3]


# ---------------------------------------------------------------------- report


def test_reports_are_sent_seldom_and_never_wait(monkeypatch):
    cluster = PureCluster()
    session = cluster.session()
    with using(session):
        for number in range(1000):
            paramesh.report(loss=torch.tensor(float(number)), accuracy=0.5)
        assert [m for _, m in cluster.calls].count("report") <= 2
        monkeypatch.setattr(reporter, "EVERY", 0.0)
        session.reporter._under_way.result(10)
        paramesh.report(loss=7)
        session.reporter._under_way.result(10)
    figures = {f.name: f.value for f in cluster.ledger.status(0.0).figures}
    assert figures == {"loss": 7.0, "accuracy": 0.5}


@pytest.mark.parametrize("figures", [{"loss": "high"}, {f"f{i}": i for i in range(65)}])
def test_what_is_no_figure_is_refused(figures):
    session = PureCluster().session()
    with using(session), pytest.raises(ConfigError, match="report"):
        paramesh.report(**figures)


def test_a_lost_report_is_no_error(monkeypatch):
    cluster = PureCluster()
    session = cluster.session()
    monkeypatch.setattr(reporter, "EVERY", 0.0)
    cluster.evict(session)
    with using(session):
        paramesh.report(loss=1)
        assert session.reporter._under_way.exception(10) is not None
        paramesh.report(loss=2)


# ---------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(progress_line, "REDRAW", 0.0)
    monkeypatch.setattr(progress_line, "PLAIN_EVERY", 0.0)


def test_progress_rewrites_one_line_on_a_terminal(fast, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with using(None):
        assert list(paramesh.progress(range(4), label="epoch 1")) == [0, 1, 2, 3]
    text = sys.stderr.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert "epoch 1  4/4  100.0%" in text.rsplit("\r", 1)[1]


def test_progress_degrades_to_plain_lines(fast, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with using(None):
        assert list(paramesh.progress(iter(range(2)))) == [0, 1]
    lines = sys.stderr.getvalue().splitlines()
    assert "\r" not in sys.stderr.getvalue()
    assert [line.split()[0] for line in lines] == ["1/2", "2/2", "2/2"]


def test_progress_survives_a_closed_stream_and_unknown_lengths(fast, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with using(None):
        loop = paramesh.progress(x for x in range(3))
        assert next(loop) == 0
        stream.close()
        assert list(loop) == [1, 2]


def test_only_the_chief_writes_and_it_shows_figures(fast, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(reporter, "EVERY", 0.0)
    cluster = PureCluster(start_workers=2)

    def work(session):
        for _ in paramesh.progress([1, 2], label=f"rank {session.rank}"):
            paramesh.report(loss=0.25)

    cluster.run(work, 2)
    assert "rank 0" in sys.stderr.getvalue()
    assert "loss 0.25" in sys.stderr.getvalue()
    assert "rank 1" not in sys.stderr.getvalue()


# ---------------------------------------------------------------------- profile, device


def test_profile_gathers_phases_of_this_thread_only_inside():
    with phase("outside"):
        pass
    with paramesh.profile() as profile:
        for _ in range(3):
            with phase("push"):
                pass
        with pytest.raises(ValueError), phase("failing"):
            raise ValueError
    with phase("outside"):
        pass
    assert {name: p.calls for name, p in profile.phases.items()} == {"push": 3, "failing": 1}
    assert profile.seconds >= profile.phases["push"].seconds >= profile.phases["push"].longest >= 0
    table = profile.table().splitlines()
    assert table[0].split() == ["phase", "calls", "mean", "ms", "max", "ms", "total", "s", "share"]
    assert len(table) == 4


def test_loading_is_profiled():
    cluster = PureCluster()

    def work(session):
        with paramesh.profile() as profile:
            for _ in paramesh.DataLoader(torch.utils.data.TensorDataset(torch.arange(8)), 2):
                pass
        return profile

    (profile,) = cluster.run(work)
    assert profile.phases["data"].calls == 5
    assert profile.phases["lease"].calls >= 2


def test_device_is_the_local_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("PARAMESH_LOCAL_RANK", "3")
    with using(None):
        assert paramesh.device() == torch.device("cuda", 1)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with using(PureCluster().session()):
        assert paramesh.device() == torch.device("cuda", 0)
    assert chosen == [torch.device("cuda", 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with using(None):
        assert paramesh.device() == torch.device("cpu")


def test_status_words_for_who_is_waited_for():
    from paramesh.waiting import describe

    status = lg.LedgerStatusResponse(
        members=[lg.Member(rank=2, slot="b/0")],
        groups=[lg.GroupStatus(name="g", waiting_for=[2, 5])],
        phase="training",
    )
    assert describe(status) == "group g: rank 2 (b/0), rank 5 (?)"
    assert describe(lg.LedgerStatusResponse(phase="waiting for workers (1 of 2 joined)")).startswith("waiting")
