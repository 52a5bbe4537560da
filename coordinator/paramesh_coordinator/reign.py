"""One coordinator in charge: an open store, and everything that runs while its term lasts.

reign = Reign(config, store)
await reign.start()             # loads, commits the new term's first decision
reign.add_services(server)
await reign.driver.deposed      # a newer coordinator is in charge
await reign.stop()              # and closes the store
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from paramesh.errors import ConfigError, ParameshError
from paramesh.v1.checkpoint_pb2_grpc import add_CheckpointsServicer_to_server
from paramesh.v1.coordinator_pb2_grpc import (
    add_AdminServicer_to_server,
    add_CatalogServicer_to_server,
    add_MapServiceServicer_to_server,
    add_MembershipServicer_to_server,
    add_ReplicasServicer_to_server,
)

from paramesh_coordinator.admin import AdminService
from paramesh_coordinator.checkpoint_admin import CheckpointsService
from paramesh_coordinator.config import CoordinatorConfig
from paramesh_coordinator.custody import Custody
from paramesh_coordinator.driver import Driver
from paramesh_coordinator.errands import Errands
from paramesh_coordinator.planning import Planning
from paramesh_coordinator.servicer import CatalogService, MapService, MembershipService, ReplicasService
from paramesh_coordinator.store import MetaStore
from paramesh_coordinator.transfer import check_not_moved

__all__ = ["Reign"]

log = logging.getLogger(__name__)


class Reign:
    """A term, from its first decision to its end; `start` once, `stop` always.

    Args:
        config: what to run as.
        store: opened for this term; closed by `stop`.

    Raises:
        ConfigError: `state` cannot be read; `job`: it is another job's.
    """

    def __init__(self, config: CoordinatorConfig, store: MetaStore):
        self.store = store
        check_not_moved(store)
        try:
            self.driver = Driver(config, store)
        except ValueError as error:
            raise ConfigError(f"state: {error}", metadata={"key": "state"}) from error
        self._check_job(config)
        self._errands = Errands(self.driver)
        self._planning = Planning(self.driver)
        self._custody = Custody(self.driver)

    def _check_job(self, config: CoordinatorConfig) -> None:
        stored = self.driver.state.job.name
        if stored != config.job:
            raise ConfigError(f"job: the state belongs to job {stored!r}, not {config.job!r}", metadata={"key": "job"})
        differing = self.driver.settings_differ()
        if differing:
            log.warning("settings of the job's first start hold, not this one's flags: %s", ", ".join(differing))

    async def start(self) -> None:
        """Commit the first decision and begin to act.

        Raises:
            ParameshError: the store refuses.
        """
        loop = asyncio.get_running_loop()

        def over(error: ParameshError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all with it
                loop.call_soon_threadsafe(self.driver.step_down, error)

        self.store.when_over(over)
        await self.driver.start()
        self._errands.start()
        self._planning.start()
        await self._custody.start()

    def add_services(self, server: Any) -> None:
        """Register the services on a gRPC server, or on what collects handlers as one does."""
        driver = self.driver
        add_MembershipServicer_to_server(MembershipService(driver), server)
        add_MapServiceServicer_to_server(MapService(driver), server)
        add_CatalogServicer_to_server(CatalogService(driver), server)
        add_ReplicasServicer_to_server(ReplicasService(driver), server)
        add_AdminServicer_to_server(AdminService(driver), server)
        add_CheckpointsServicer_to_server(CheckpointsService(driver, self._custody), server)

    async def stop(self) -> None:
        """Finish the commit under way, close the store."""
        await self._custody.stop()
        await self._planning.stop()
        await self._errands.stop()
        await self.driver.stop()
        await asyncio.to_thread(self.store.close)
