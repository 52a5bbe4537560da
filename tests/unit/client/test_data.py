"""DataLoader over the real ledger: every sample counts once, loops end together, forks work."""

import collections

import paramesh
import pytest
import torch
import torch.utils.data
from paramesh.errors import ConfigError, Fenced, ParameshError
from paramesh.leases import permutation
from paramesh.session import using
from paramesh.v1 import ledger_pb2 as lg
from pure_cluster import PureCluster, Trainer


class Numbers(torch.utils.data.Dataset):
    """Sample i is the number i."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor(index)


def train(session, loader, epochs, seen, step_every=1):
    """Take a step after every batch; note what was delivered."""
    trainer = Trainer(session)
    for _ in range(epochs):
        mine = []
        for number, batch in enumerate(loader, 1):
            mine.append(batch.tolist())
            if number % step_every == 0:
                trainer.step()
        seen.append(mine)
    return trainer


def consumed_chunks(cluster):
    return collections.Counter((r.dataset, r.epoch, r.begin, r.end) for _, r in cluster.consumed)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_sample_counts_in_exactly_one_committed_step(workers, num_workers):
    cluster = PureCluster(start_workers=workers)
    samples, size, epochs = 3 * 8 * 3 + 5, 8, 2  # 3k + 1 batches for three workers, the last one short

    def work(session):
        seen = []
        loader = paramesh.DataLoader(Numbers(samples), size, shuffle=True, seed=7, num_workers=num_workers)
        train(session, loader, epochs, seen)
        return seen

    results = cluster.run(work, workers)
    for epoch in range(epochs):
        delivered = sorted(i for mine in results for batch in mine[epoch] for i in batch)
        assert delivered == list(range(samples))
    counts = consumed_chunks(cluster)
    assert set(counts.values()) == {1}
    assert len(counts) == epochs * -(-samples // size)
    status = cluster.ledger.status(0.0)
    assert sum(member.samples for member in status.members) in (0, epochs * samples)  # 0: all have left


def test_the_ith_lease_of_a_rank_is_chunk_i_times_world_plus_rank():
    cluster = PureCluster(start_workers=2)
    order = permutation(40, seed=3, epoch=0)

    def work(session):
        seen = []
        train(session, paramesh.DataLoader(Numbers(40), 5, shuffle=True, seed=3), 1, seen)
        return seen[0]

    for rank, batches in enumerate(cluster.run(work, 2)):
        assert batches == [order[5 * (2 * i + rank) :][:5].tolist() for i in range(4)]


def test_alone_and_one_worker_see_the_same_batches():
    def batches():
        loader = paramesh.DataLoader(Numbers(23), 4, shuffle=True, seed=11)
        return [[b.tolist() for b in loader] for _ in range(3)]

    cluster = PureCluster()
    with using(None):
        alone = batches()
    assert alone == cluster.run(lambda session: batches())[0]
    assert alone[0] != alone[1]


def test_unshuffled_order_is_the_datasets_own():
    with using(None):
        loader = paramesh.DataLoader(Numbers(7), 3)
        assert [b.tolist() for b in loader] == [[0, 1, 2], [3, 4, 5], [6]]
        assert len(loader) == 3
        assert [b.tolist() for b in loader] == [[0, 1, 2], [3, 4, 5], [6]]


def test_drop_last_drops_the_epochs_tail_only():
    cluster = PureCluster(start_workers=2)

    def work(session):
        loader = paramesh.DataLoader(Numbers(23), 4, drop_last=True)
        assert len(loader) == 3  # ceil(5 / 2)
        return [b.tolist() for b in loader]

    results = cluster.run(work, 2)
    assert sorted(i for mine in results for b in mine for i in b) == list(range(20))


def test_an_early_break_returns_what_was_not_delivered():
    cluster = PureCluster(start_workers=2)

    def work(session):
        trainer = Trainer(session)
        loader = paramesh.DataLoader(Numbers(64), 4, num_workers=1 if session.rank == 0 else 0)
        mine = []
        for batch in loader:
            mine.append(batch.tolist())
            trainer.step()
            if session.rank == 0 and len(mine) == 3:
                break
        paramesh.barrier()  # leaving gives leases back too; the others must not need it
        return mine

    first, second = cluster.run(work, 2)
    assert len(first) == 3
    assert sorted(i for b in first + second for i in b) == list(range(64))
    assert set(consumed_chunks(cluster).values()) == {1}


def test_an_accumulation_remainder_does_not_hold_the_epoch_open():
    cluster = PureCluster(start_workers=2)

    def work(session):
        seen = []
        trainer = train(session, paramesh.DataLoader(Numbers(5 * 4), 4), 1, seen, step_every=2)
        return len(seen[0]), trainer.position

    results = cluster.run(work, 2)
    assert sum(count for count, _ in results) == 5


def test_an_accumulation_remainder_counts_in_the_next_epochs_first_step():
    cluster = PureCluster()

    def work(session):
        seen = []
        train(session, paramesh.DataLoader(Numbers(5 * 4), 4), 3, seen, step_every=2)
        return seen

    cluster.run(work)
    assert set(consumed_chunks(cluster).values()) == {1}
    steps = collections.Counter(len(r.contributors) for r in cluster.records.values())
    assert steps == {1: 6}
    by_epoch = collections.Counter(r.epoch for _, r in cluster.consumed)
    assert by_epoch == {0: 5, 1: 5, 2: 4}


@pytest.mark.parametrize("training", [True, False])
def test_who_breaks_out_keeps_nobody_waiting(training):
    cluster = PureCluster(start_workers=2)

    def work(session):
        loader = paramesh.DataLoader(Numbers(40), 4, train=training)
        trainer, mine = Trainer(session), []
        for batch in loader:
            mine.append(batch.tolist())
            if session.rank == 0 and len(mine) == 2:
                break  # the second batch was delivered and is in no step
            if training:
                trainer.step()
        paramesh.barrier("after")  # rank 1 gets here only if it does not wait for rank 0's batch
        return mine

    first, second = cluster.run(work, 2)
    assert len(first) == 2
    assert sorted(i for b in first + second for i in b) == list(range(40))


def test_an_evaluation_is_forgotten_by_the_ledger():
    cluster = PureCluster(start_workers=2)

    def work(session):
        loader = paramesh.DataLoader(Numbers(24), 4, train=False)
        for _ in range(5):
            assert 1 <= len(list(loader)) <= 6
        paramesh.barrier("all-evaluated")
        status = session.call(session.client.ledger.ledger_status(lg.LedgerStatusRequest()), "status")
        paramesh.barrier("all-seen")  # who leaves gives back what it holds
        return len(status.epochs)

    assert max(cluster.run(work, 2)) <= 1


def test_an_evicted_evaluation_starts_over_for_what_was_lost():
    cluster = PureCluster()

    def work(session):
        mine = []
        for batch in paramesh.DataLoader(Numbers(40), 4, train=False):
            mine += batch.tolist()
            if len(mine) == 12 and session.membership == 1:
                cluster.evict(session)
        return session.membership, sorted(set(mine))

    assert cluster.run(work) == [(2, list(range(40)))]


def test_a_worker_that_joins_later_passes_finished_epochs():
    cluster = PureCluster()

    def first(session):
        seen = []
        train(session, paramesh.DataLoader(Numbers(12), 4), 3, seen)
        return seen

    assert [len(s) for s in cluster.run(first)[0]] == [3, 3, 3]

    def later(session):
        seen = []
        trainer = train(session, paramesh.DataLoader(Numbers(12), 4), 4, seen)
        return seen, trainer.pulled

    seen, pulled = cluster.run(later)[0]
    assert [len(s) for s in seen] == [0, 0, 0, 3]
    assert pulled == [9]


def test_epochs_starts_at_the_live_one_even_after_breaks():
    cluster = PureCluster()

    def script(session, stop):
        begun, delivered = [], 0
        loader = paramesh.DataLoader(Numbers(40), 4)
        trainer = Trainer(session)
        for epoch in paramesh.epochs(5):
            begun.append(epoch)
            for number, _ in enumerate(loader):
                trainer.step()
                delivered += 1
                if number == 1:
                    break  # a short epoch: the rest of it is never trained on
            if epoch == stop:
                return begun, delivered
        return begun, delivered

    assert cluster.run(lambda s: script(s, 2))[0] == ([0, 1, 2], 6)
    begun, delivered = cluster.run(lambda s: script(s, None))[0]
    assert begun == [2, 3, 4]
    assert delivered == 6
    assert max(r.epoch for _, r in cluster.consumed) == 4


def test_an_evicted_worker_rejoins_and_goes_on_in_the_same_epoch():
    cluster = PureCluster()

    def work(session):
        trainer, mine, first_id = Trainer(session), [], session.client.client_id
        loader = paramesh.DataLoader(Numbers(40), 4, num_workers=1)
        for batch in loader:
            mine.append(batch.tolist())
            if len(mine) == 3 and session.membership == 1:
                cluster.evict(session)
                with pytest.raises(Fenced):
                    trainer.step()
                session.rejoin()
                continue
            trainer.step()
        assert session.client.client_id > first_id
        assert session.rank == 0
        return mine

    mine = cluster.run(work)[0]
    chunks = consumed_chunks(cluster)
    assert set(chunks.values()) == {1}
    assert len(chunks) == 10
    assert len(mine) == 11  # the batch whose step was lost was delivered again


def test_eviction_found_out_by_the_loader():
    cluster = PureCluster()

    def work(session):
        trainer = Trainer(session)
        for count, _ in enumerate(paramesh.DataLoader(Numbers(400), 4), 1):
            trainer.step()
            if count == 5:
                cluster.evict(session)
                session.forget_activity()
        return session.membership

    assert cluster.run(work) == [2]
    assert set(consumed_chunks(cluster).values()) == {1}
    assert len(consumed_chunks(cluster)) == 100


def test_eviction_found_out_while_becoming_active():
    """Between the ledger's note and the pull: the group cannot be opened any more."""
    cluster = PureCluster()

    class Unlucky(Trainer):
        def on_active(self, positions):
            if self.session.membership == 1:
                cluster.evict(self.session)
            super().on_active(positions)

    def work(session):
        trainer = Unlucky(session)
        for _ in paramesh.DataLoader(Numbers(40), 4):
            trainer.step()
        return session.membership

    assert cluster.run(work) == [2]
    assert set(consumed_chunks(cluster).values()) == {1}
    assert len(consumed_chunks(cluster)) == 10


def test_a_dead_workers_leases_go_to_the_others():
    cluster = PureCluster(start_workers=2)

    def work(session):
        trainer, mine = Trainer(session), []
        for batch in paramesh.DataLoader(Numbers(80), 4):
            mine.append(batch.tolist())
            if session.rank == 1 and len(mine) == 4:
                cluster.evict(session)
                session.leave(gracefully=False)
                return mine[:-1]
            trainer.step()
        return mine

    first, second = cluster.run(work, 2)
    assert sorted(i for b in first + second for i in b) == list(range(80))
    assert set(consumed_chunks(cluster).values()) == {1}


def test_two_loaders_have_epochs_of_their_own():
    cluster = PureCluster(start_workers=2)

    def work(session):
        real = paramesh.DataLoader(Numbers(24), 4)
        noise = paramesh.DataLoader(Numbers(32), 4)
        trainer, count = Trainer(session), 0
        for _ in zip(real, noise, strict=False):
            trainer.step()
            count += 1
        return real.name, noise.name, count

    results = cluster.run(work, 2)
    assert results == [("", "loader-1", 3), ("", "loader-1", 3)]
    assert {r.dataset for _, r in cluster.consumed} == {"", "loader-1"}


def test_weight_is_samples_since_this_groups_last_step():
    cluster = PureCluster()

    def work(session):
        one, two = Trainer(session, "d"), Trainer(session, "g")
        weights = []
        for number, _ in enumerate(paramesh.DataLoader(Numbers(22), 4)):
            first = one.step()
            weights.append(first.contributors[0].weight)
            if number % 2:
                weights.append(two.step().contributors[0].weight)
        return weights

    assert cluster.run(work)[0] == [4, 4, 8, 4, 4, 8, 4, 2, 6]


def test_an_evaluation_binds_to_no_step_and_nobody_waits_for_it():
    cluster = PureCluster(start_workers=2)

    def work(session):
        trainer = Trainer(session)
        train_loader = paramesh.DataLoader(Numbers(32), 4)
        test_loader = paramesh.DataLoader(Numbers(30), 4)
        tested = 0
        for number, _ in enumerate(train_loader):
            trainer.step()
            if number == 1:
                with torch.no_grad():
                    for batch in test_loader:
                        assert not session.active  # steps wait for it but once, and briefly
                        tested += len(batch)
        return tested

    assert sum(cluster.run(work, 2)) == 30
    assert {r.dataset for _, r in cluster.consumed} == {""}
    weights = {c.weight for record in cluster.records.values() for c in record.contributors}
    assert weights == {4.0}


def test_batch_size_none_yields_samples():
    cluster = PureCluster(start_workers=2)
    results = cluster.run(lambda session: [int(s) for s in paramesh.DataLoader(Numbers(9), None)], 2)
    assert sorted(results[0] + results[1]) == list(range(9))


def test_persistent_workers_serve_all_epochs():
    cluster = PureCluster()

    def work(session):
        loader = paramesh.DataLoader(Numbers(16), 4, num_workers=2, persistent_workers=True)
        return [[b.tolist() for b in loader] for _ in range(2)]

    for epoch in cluster.run(work)[0]:
        assert sorted(i for b in epoch for i in b) == list(range(16))


class Nosy(Numbers):
    """A dataset whose samples use the cluster, which a forked worker cannot."""

    def __getitem__(self, index):
        try:
            paramesh.barrier()
        except ParameshError as error:
            return error.reason
        return "no error"


def test_a_forked_loader_worker_that_uses_the_cluster_gets_a_clear_error():
    cluster = PureCluster()
    batch = cluster.run(lambda s: next(iter(paramesh.DataLoader(Nosy(2), 2, num_workers=1))))[0]
    assert batch == ["FORKED", "FORKED"]


def test_unequal_loaders_are_refused_by_name_of_the_difference():
    cluster = PureCluster(start_workers=2)

    def work(session):
        return list(paramesh.DataLoader(Numbers(12), 4, seed=session.rank))

    with pytest.raises(ParameshError, match="seed") as caught:
        cluster.run(work, 2)
    assert caught.value.reason == "SCHEMA"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"sampler": [0, 1]}, "sampler"),
        ({"batch_sampler": [[0, 1]]}, "batch_sampler"),
        ({"generator": torch.Generator(), "shuffle": True}, "generator"),
        ({"in_order": False}, "in_order"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"dataset": Stream()}, "dataset"),
        ({"dataset": {1, 2}}, "dataset"),
    ],
)
def test_what_cannot_work_is_refused_alone_too(arguments, argument):
    with using(None), pytest.raises(ConfigError) as caught:
        paramesh.DataLoader(**{"dataset": Numbers(4), **arguments})
    assert caught.value.metadata == {"argument": argument}


def test_the_permutation_is_a_function_of_seed_and_epoch():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    orders = {(s, e): tuple(permutation(50, s, e).tolist()) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert orders[1, 2] == tuple(permutation(50, 1, 2).tolist())
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_order_never_changes_between_releases():
    assert permutation(10, 0, 0).tolist() == permutation(10, 0, 0).tolist()
    assert permutation(10, 2**63 + 5, 3).tolist() != permutation(10, 5, 3).tolist()


def test_a_spawned_loader_worker_does_not_join_by_the_environment(monkeypatch):
    monkeypatch.setenv("PARAMESH_COORDINATOR", "127.0.0.1:1")
    with using(None):
        loader = paramesh.DataLoader(Nosy(2), 2, num_workers=1, multiprocessing_context="spawn")
        assert next(iter(loader)) == ["FORKED", "FORKED"]
