"""acks=primary in training: the option, the schema, and a worker that goes on over a lost primary."""

import paramesh
import pytest
import torch
from paramesh.errors import ConfigError, ParameshError
from paramesh.testing import Cluster
from paramesh_coordinator.rows import LossRow

from tests.cluster.waiting import wait_until


def model_of(length=40):
    model = torch.nn.Linear(length, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
    return model


@pytest.mark.parametrize("mode", ["sync", "ssp", "local"])
def test_it_belongs_to_async_mode(mode):
    model = model_of()
    with pytest.raises(ConfigError, match="belongs to mode='async'"):
        paramesh.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, mode=mode, acks="primary")


def test_workers_must_agree_on_it():
    with Cluster(servers=1, workers=1) as cluster:
        with paramesh.connect(cluster.address) as client:
            client.create_table("t", {"w": torch.zeros(8)}, acks="primary")
            with pytest.raises(ParameshError, match="acks") as caught:
                client.create_table("t", {"w": torch.zeros(8)})
        assert caught.value.reason == "SCHEMA"


def test_training_goes_on_over_a_lost_primary_and_every_update_is_there_or_counted():
    """Each step adds one: what the parameters lack of the steps is what the partitions say was lost."""
    with Cluster(servers=3, workers=1, replicas=2, failure_timeout=1.0, heartbeat_interval=0.1) as cluster:
        steps = 120

        def script(rank):
            model = model_of()
            optimizer = paramesh.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=1.0), model, mode="async", acks="primary"
            )
            for step in range(steps):
                model.weight.grad = -torch.ones_like(model.weight)
                optimizer.step()
                if step == 60:
                    row = cluster._coordinator._driver.state.partition(1)
                    cluster.kill_server(int(row.server.split("-")[1]))
            return model.weight.detach().clone()

        (values,) = cluster.run(script)
        (count,) = values.unique().tolist()
        replicas = [server._shards.held[1] for server in cluster._servers.values() if 1 in server._shards.held]
        (partition,) = [held.partition for held in replicas if held.replica.serving]
        assert count + partition.lost == steps
        assert partition.pushes + partition.lost == steps

        def told():
            return sum(row.total for row in cluster._coordinator._driver.state.rows(LossRow).values())

        wait_until(lambda: told() == partition.lost, 10, "the report")
