"""Sequence numbers against a model: exactly once under any duplication and order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paramesh.errors import ParameshError
from paramesh_server.dedup import ASSIGN_WINDOW, WINDOW, Dedup, Entry, Verdict


def push(dedup: Dedup, client: int, seq: int, digest: tuple[object, ...] = ("d",), lsn: int = 0) -> Verdict:
    verdict = dedup.admit(client, seq, digest)
    if verdict is Verdict.NEW:
        dedup.record(client, seq, Entry(digest, lsn or seq))
    return verdict


def reason(dedup: Dedup, client: int, seq: int, digest: tuple[object, ...] = ("d",)) -> str:
    with pytest.raises(ParameshError) as caught:
        push(dedup, client, seq, digest)
    return caught.value.reason


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), max_size=80))
def test_applied_exactly_once_whatever_arrives(arrivals: list[tuple[int, int]]) -> None:
    """Invariants 2 and 3: no push is applied twice, a duplicate's reply equals the first."""
    dedup = Dedup()
    applied: list[tuple[int, int]] = []
    for client, seq in arrivals:
        digest = ("bytes of", client, seq)
        last = max((s for c, s in applied if c == client), default=0)
        if not last - WINDOW < seq <= last + WINDOW:
            expected = "SEQ_TOO_OLD" if seq <= last else "SEQ_TOO_FAR" if last else "CLIENT_FENCED"
            assert reason(dedup, client, seq, digest) == expected
            continue
        verdict = dedup.admit(client, seq, digest)
        if verdict is Verdict.NEW:
            applied.append((client, seq))
            dedup.record(client, seq, Entry(digest, len(applied)))
        elif verdict is Verdict.DUPLICATE:
            assert dedup.entry(client, seq).lsn == applied.index((client, seq)) + 1
    assert len(applied) == len(set(applied))
    for client in {client for client, _ in applied}:
        sequence = [seq for who, seq in applied if who == client]
        assert sequence == list(range(1, len(sequence) + 1))


@given(st.permutations(range(1, WINDOW + 1)), st.data())
def test_a_full_window_in_any_order_ends_up_applied_in_order(order: list[int], data: st.DataObject) -> None:
    """Invariant 2: held pushes are tried again until none is left, as the servicer does."""
    dedup, applied, held = Dedup(), [], []
    for seq in order:
        held += [seq] * data.draw(st.integers(1, 3))
        for _ in range(len(order)):
            for waiting in list(held):
                if (verdict := push(dedup, 9, waiting)) is not Verdict.HOLD:
                    held.remove(waiting)
                    applied += [waiting] * (verdict is Verdict.NEW)
    assert applied == sorted(order)
    assert held == []


def test_the_table_of_the_protocol() -> None:
    dedup = Dedup()
    for seq in range(1, 8):
        assert push(dedup, 1, seq) is Verdict.NEW
    assert push(dedup, 1, 7) is Verdict.DUPLICATE
    assert push(dedup, 1, 3) is Verdict.DUPLICATE
    assert reason(dedup, 1, 7, ("other",)) == "SEQ_REUSED"
    assert reason(dedup, 1, 2) == "SEQ_TOO_OLD"
    assert push(dedup, 1, 9) is Verdict.HOLD
    assert push(dedup, 1, 12) is Verdict.HOLD
    assert reason(dedup, 1, 13) == "SEQ_TOO_FAR"
    assert reason(dedup, 1, 0) == "MISSING_FIELD"
    assert push(dedup, 2, WINDOW) is Verdict.HOLD
    assert reason(dedup, 2, WINDOW + 1) == "CLIENT_FENCED"


def test_a_fence_outlives_the_entries() -> None:
    dedup = Dedup()
    push(dedup, 5, 1)
    assert dedup.fence(5)
    assert not dedup.fence(5)
    assert reason(dedup, 5, 1) == "CLIENT_FENCED"
    assert reason(dedup, 5, 2) == "CLIENT_FENCED"
    dedup.fence(77)  # never seen: its delayed first push must not pass for new
    assert reason(dedup, 77, 1) == "CLIENT_FENCED"


def test_tombstones_of_contiguous_ids_take_no_room() -> None:
    dedup = Dedup()
    for client in [3, 1, 2, *range(5, 1000)]:
        dedup.fence(client)
    assert len(dedup._fenced) == 995
    dedup.fence(4)
    assert len(dedup._fenced) == 0
    assert dedup.fenced(999)
    assert not dedup.fenced(1000)


def test_a_refused_push_is_remembered_with_its_reason() -> None:
    dedup = Dedup()
    dedup.record(1, 1, Entry(("bad",), 4, ("PAYLOAD_SIZE", "too short")))
    assert push(dedup, 1, 1, ("bad",)) is Verdict.DUPLICATE
    error = dedup.entry(1, 1).error()
    assert error is not None
    assert (error.reason, str(error)) == ("PAYLOAD_SIZE", "too short")
    assert push(dedup, 1, 2) is Verdict.NEW


def test_assigns_are_remembered_in_a_window() -> None:
    dedup = Dedup()
    assert dedup.assigned(1, 1) == 0
    for assign_id in range(1, ASSIGN_WINDOW + 3):
        dedup.record_assign(1, assign_id, 100 + assign_id)
    assert dedup.assigned(1, 3) == 103
    with pytest.raises(ParameshError) as caught:
        dedup.assigned(1, 2)
    assert caught.value.reason == "SEQ_TOO_OLD"


def test_the_hashed_form_tells_states_apart() -> None:
    def canonical(*pushes: tuple[int, int], fenced: tuple[int, ...] = ()) -> bytes:
        dedup = Dedup()
        for client, seq in pushes:
            push(dedup, client, seq)
        for client in fenced:
            dedup.fence(client)
        return b"".join(dedup.canonical())

    assert canonical((1, 1), (2, 1)) == canonical((2, 1), (1, 1))
    assert canonical((1, 1)) != canonical((1, 1), (1, 2))
    assert canonical((1, 1)) != canonical((1, 1), fenced=(2,))
