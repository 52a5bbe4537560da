"""Connections that send no requests: answered, answered late, cut; and hosts that open new ones."""

import asyncio

from paramesh.offenders import COOLS_S, CUT, FREE, HELD, HOLD_S, HOT, HOT_CUT, HOT_HOLD_S, Offenders

PEER = "ipv4:1.2.3.4:5"


class Bench:
    """Offenders on a clock that stands until somebody is held back."""

    def __init__(self) -> None:
        self.now = 0.0
        self.holds: list[float] = []
        self.cut: list[str] = []
        self.offenders = Offenders(lambda peer: bool(self.cut.append(peer) or True), lambda: self.now, self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.holds.append(seconds)

    def offend(self, peer: str, times: int = 1) -> None:
        for _ in range(times):
            asyncio.run(self.offenders.offended(peer))

    def heat(self, host: str) -> None:
        """One offence from each of many connections."""
        for port in range(int(HOT)):
            self.offend(f"{host}:{port}")


def test_a_connection_is_answered_then_held_back_then_cut():
    bench = Bench()
    bench.offend(PEER, CUT - 1)
    assert (bench.holds, bench.cut) == ([HOLD_S] * (CUT - 1 - FREE), [])
    bench.offenders.forgive(PEER)
    bench.offend(PEER, CUT)
    assert bench.cut == [PEER]
    offenders = bench.offenders
    assert (offenders.offences, offenders.cuts, offenders.watching) == (2 * CUT - 1, 1, False)


def test_a_host_that_opens_connection_after_connection_is_held_from_the_first_offence_on():
    bench = Bench()
    bench.heat("ipv4:1.2.3.4")
    assert (bench.holds, bench.cut) == ([], [])
    bench.offend("ipv4:1.2.3.4:7777", HOT_CUT)
    assert (bench.holds, bench.cut) == ([HOT_HOLD_S] * (HOT_CUT - 1), ["ipv4:1.2.3.4:7777"])
    bench.offend("ipv4:5.6.7.8:1")
    assert len(bench.holds) == HOT_CUT - 1, "another host is answered at once"


def test_a_connection_that_brought_requests_may_err_whatever_its_host_did():
    bench = Bench()
    bench.heat("ipv4:1.2.3.4")
    for _ in range(3):
        bench.offenders.forgive("ipv4:1.2.3.4:7777")
        bench.offend("ipv4:1.2.3.4:7777", FREE)
    assert (bench.holds, bench.cut) == ([], [])
    bench.offend("ipv4:1.2.3.4:7777", HOT_CUT)  # in a row now
    assert (bench.holds, bench.cut) == ([HOT_HOLD_S] * (HOT_CUT - 1), ["ipv4:1.2.3.4:7777"])


def test_a_hot_host_cools():
    bench = Bench()
    bench.heat("ipv6:[::1]")
    bench.now += 10 * COOLS_S
    bench.offend("ipv6:[::1]:7777", FREE)
    assert (bench.holds, bench.cut) == ([], [])


def test_so_many_answers_are_held_back_and_no_more():
    cut: list[str] = []

    async def test() -> None:
        release = asyncio.Event()

        async def hold(_seconds: float) -> None:
            await release.wait()

        offenders = Offenders(lambda peer: bool(cut.append(peer) or True), lambda: 0.0, hold)
        held = []
        for number in range(int(HOT) + HELD):
            held.append(asyncio.ensure_future(offenders.offended(f"ipv4:1.2.3.4:{number}")))
            await asyncio.sleep(0)
        assert not cut
        await offenders.offended("ipv4:1.2.3.4:9999")
        assert cut == ["ipv4:1.2.3.4:9999"]
        release.set()
        await asyncio.gather(*held)

    asyncio.run(test())
