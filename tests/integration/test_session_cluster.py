"""Loops, evaluations, means and leaving over a real in-process cluster."""

import time

import paramesh
import pytest
import torch
from paramesh.session import current


class Numbers(torch.utils.data.Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(index)])


def made(name=None, length=40):
    model = torch.nn.Linear(1, 1)
    optimizer = paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-4), model)
    return model, optimizer, paramesh.DataLoader(Numbers(length), 4, shuffle=True, name=name)


def step(model, optimizer, batch):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


def test_a_shared_evaluation_begins_at_once_although_another_worker_is_late():
    def work(rank):
        model, optimizer, loader = made()
        for batch in loader:
            step(model, optimizer, batch)
        tests = paramesh.DataLoader(Numbers(30), 3, name="test")
        if rank == 1:
            time.sleep(2)  # its part of the evaluation comes late; not the others'
        began, seen, first = time.monotonic(), [], None
        with torch.no_grad():
            for batch in tests:
                first = first or time.monotonic() - began
                seen += batch.flatten().tolist()
        correct = paramesh.mean(sum(seen), weight=1)
        return first, seen, correct

    with paramesh.testing.Cluster(servers=1, workers=2) as cluster:
        (first, zero, mean), (_, one, other) = cluster.run(work)
    assert first < 1.5
    assert sorted(zero + one) == list(range(30))
    assert mean == other == sum(range(30)) / 2


def test_a_break_by_one_worker_keeps_nobody_waiting():
    def work(rank):
        model, optimizer, loader = made()
        count = 0
        for batch in loader:
            count += 1
            if rank == 0 and count == 2:
                break  # delivered, and in no step
            step(model, optimizer, batch)
        paramesh.barrier("after-the-loop")
        for batch in loader:  # the second epoch is whole again
            step(model, optimizer, batch)
        return count, current().deliveries.samples

    with paramesh.testing.Cluster(servers=1, workers=2) as cluster:
        began = time.monotonic()
        (zero, _), (one, _) = cluster.run(work)
    assert (zero, one) == (2, 8)
    assert time.monotonic() - began < 15


def test_len_world_size_and_chief_are_of_the_whole_job():
    def work(rank):
        _, _, loader = made(length=41)
        seen = len(loader), paramesh.world_size(), paramesh.is_chief(), paramesh.rank()
        paramesh.barrier()  # who leaves is no longer counted
        return seen

    with paramesh.testing.Cluster(servers=1, workers=3) as cluster:
        results = cluster.run(work)
    assert [r[0] for r in results] == [4, 4, 4]
    assert [r[1] for r in results] == [3, 3, 3]
    assert [r[2:] for r in results] == [(True, 0), (False, 1), (False, 2)]


def test_profile_names_what_a_loop_spends_its_time_on():
    def work(rank):
        model, optimizer, loader = made()
        with paramesh.profile() as profile:
            for batch in loader:
                step(model, optimizer, batch)
        return profile

    with paramesh.testing.Cluster(servers=1, workers=1) as cluster:
        (profile,) = cluster.run(work)
    assert profile.phases["step"].calls == 10
    assert {"lease", "data"} <= profile.phases.keys()
    assert profile.phases["step"].seconds < profile.seconds


@pytest.mark.parametrize("mode", ["sync", "local"])
def test_uneven_loops_keep_schedulers_equal(mode):
    """Five batches for three workers: who has none left misses steps, and the schedule of them."""

    def work(rank):
        model = torch.nn.Linear(1, 1)
        inner = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        loader = paramesh.DataLoader(Numbers(20), 4)
        optimizer = paramesh.DistributedOptimizer(inner, model, mode=mode)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=100)
        paramesh.state(scheduler=scheduler)
        for _ in range(4):
            for batch in loader:
                step(model, optimizer, batch)
                scheduler.step()
        paramesh.barrier()
        return (
            {group: position.next_step for group, position in current().positions.items()},
            [(g["lr"], g["momentum"]) for g in inner.param_groups],
            scheduler.last_epoch,
        )

    with paramesh.testing.Cluster(servers=1, workers=3) as cluster:
        results = cluster.run(work)
    fullest = max(last for _, _, last in results)
    assert fullest == 8
    for _, _, last in results:
        assert last in (fullest, fullest - 1)  # the last epoch's second step was not everybody's
    ends = {last: tuple(settings) for _, settings, last in results}
    for _, settings, last in results:
        assert tuple(settings) == ends[last]
