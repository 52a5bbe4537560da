"""A server that is asked to go gives away what it holds first.

    lost = await Draining(me, job, link).run(timeout)
    # empty: nothing that only this process has

Where nothing can go anywhere (no other server, or nobody trains any more), and where no
coordinator answers, it does not wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from paramesh.channel import header
from paramesh.coordinator_link import CoordinatorLink
from paramesh.errors import ParameshError
from paramesh.v1 import coordinator_pb2 as co
from paramesh.v1 import types_pb2 as pb
from paramesh.v1.coordinator_pb2_grpc import AdminStub

log = logging.getLogger(__name__)

CALL_S = 2.0
"""Deadline of one question to the coordinator; without an answer this process just goes."""

LOOK_S = 0.3
"""Seconds between looks when no new map comes meanwhile."""

SAY_S = 5.0
"""Seconds between two lines in the log about what is waited for."""


class Draining:
    """Asks the coordinator to empty this server, and waits.

    Args:
        me: this process.
        job: the cluster's name.
        link: the coordinator, and the newest map.
    """

    def __init__(self, me: pb.ReplicaRef, job: str, link: CoordinatorLink) -> None:
        self._me = me
        self._job = job
        self._link = link

    async def run(self, timeout: float) -> list[int]:
        """Wait until nothing is held here, or nothing more can go, or the time is over.

        Args:
            timeout: seconds in all.

        Returns:
            Partitions that only this process has although they could have gone: lost with it.
        """
        end, said = time.monotonic() + timeout, time.monotonic() - SAY_S
        while True:
            version = self._link.routes.version if self._link.routes else 0
            try:
                answer = await self._ask()
            except ParameshError as error:
                log.warning("draining=not possible reason=%s: %s", error.reason, error)
                return []
            if answer.nowhere or not answer.held or not answer.moving:
                return self._over(answer)
            if time.monotonic() >= end:
                log.error("draining=given up after_s=%g partitions=%s", timeout, _few(answer.held))
                return list(answer.only_here)
            if time.monotonic() - said >= SAY_S:
                said = time.monotonic()
                log.info("draining=waiting for partitions=%s moving=%s", _few(answer.held), _few(answer.moving))
            await self._link.wait_for_map(version, LOOK_S)

    async def _ask(self) -> co.DrainResponse:
        request = co.DrainRequest(
            request=header(self._job), server=self._me.node, incarnation=self._me.incarnation, leaving=True
        )
        answer: co.DrainResponse = await self._link.call(
            lambda channel: AdminStub(channel).Drain(request, timeout=CALL_S), CALL_S, "draining this server"
        )
        return answer

    def _over(self, answer: co.DrainResponse) -> list[int]:
        if answer.nowhere:
            log.info("draining=nowhere to go held=%s", _few(answer.held))
            return []
        if answer.only_here:
            log.error("draining=stuck: no other server takes partitions=%s", _few(answer.only_here))
        else:
            log.info("draining=done held=%s", _few(answer.held))
        return list(answer.only_here)


def _few(partitions: Sequence[int]) -> str:
    return ",".join(map(str, partitions[:8])) + (f",.. ({len(partitions)})" if len(partitions) > 8 else "")
