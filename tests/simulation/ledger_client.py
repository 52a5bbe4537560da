"""A client's side of the ledger: `ledger_client.LedgerClient`, with all the time there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paramesh.channel import header
from paramesh.errors import Action, ParameshError

from tests.simulation.ledger_host import JOB, Asked
from tests.simulation.retry import Backoff

if TYPE_CHECKING:
    from tests.simulation.clients import Client

CALL_S = 3.0
"""`ledger_client._CALL_S` is 25 s: a seed lives less."""

PASSING = ("UNREACHABLE", "DEADLINE", "PARTITION_OFFLINE")


class LedgerClient:
    """Calls to the ledger's primary, each repeated until it is answered."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def ask(self, method: str, request: Any) -> Any:
        """The answer; refusals that do not pass are raised."""
        client = self._client
        backoff = Backoff(client.world.rng, first=0.02, cap=0.5)
        while True:
            version = client.version
            try:
                return await self._once(method, request)
            except ParameshError as error:
                if error.action not in (Action.BACK_OFF, Action.REFRESH) and error.reason not in PASSING:
                    raise
                last = error
            if last.reason == "WAITING_FOR_WORKERS":
                continue
            wait = backoff.next()
            if last.action is not Action.REFRESH and last.reason not in ("UNREACHABLE", "PARTITION_OFFLINE"):
                await client.kernel.sleep(wait)
            elif await client.wait_for_map(version, wait):
                backoff = Backoff(client.world.rng, first=0.02, cap=0.5)

    async def _once(self, method: str, request: Any) -> Any:
        client = self._client
        address, _ = await client.primary(0)
        sent = type(request)()
        sent.CopyFrom(request)
        assert client.routes is not None
        sent.request.CopyFrom(header(JOB, client.routes.generation, client.client_id))
        asked = Asked(method, sent, CALL_S)
        client.sent.append((address, "ledger", asked))
        return await client.net.call(client.process, address, "ledger", asked, CALL_S)
