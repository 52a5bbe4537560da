"""Names in certificates and tokens: what is read, what is refused, whose client ids are whose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paramesh.errors import ParameshError
from paramesh.identity import MARK_BITS, Identity, Role

SEGMENTS = st.from_regex(r"[A-Za-z0-9._-]{1,200}", fullmatch=True).filter(lambda text: text not in (".", ".."))
IDENTITIES = st.builds(Identity, SEGMENTS, st.sampled_from(Role), SEGMENTS)


@given(IDENTITIES)
def test_what_is_written_is_read(who: Identity) -> None:
    assert Identity.from_uri(who.uri) == who


@given(st.text())
def test_any_text_is_an_identity_or_none(text: str) -> None:
    for uri in (text, f"spiffe://paramesh/{text}", f"spiffe://paramesh/job/worker/{text}"):
        found = Identity.from_uri(uri)
        assert found is None or found.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "", "spiffe://paramesh/", "spiffe://paramesh/job/worker", "spiffe://paramesh/job/worker/", "spiffe://other/j/worker/n",
        "spiffe://paramesh/job/root/n", "spiffe://paramesh/job/WORKER/n", "spiffe://paramesh/../worker/n",
        "spiffe://paramesh/job/worker/a/b", "spiffe://paramesh/job/worker/a b", "spiffe://paramesh/job/worker/a%2fb",
        "https://paramesh/job/worker/n", " spiffe://paramesh/job/worker/n", "spiffe://paramesh/job/worker/n\n",
    ],
)  # fmt: skip
def test_what_is_no_identity(uri: str) -> None:
    assert Identity.from_uri(uri) is None


@pytest.mark.parametrize(("job", "name"), [("a/b", "n"), ("", "n"), ("j", ".."), ("j", "é"), ("j", "n\n"), ("j", "")])
def test_what_cannot_be_one(job: str, name: str) -> None:
    with pytest.raises(ParameshError) as refused:
        Identity(job, Role.WORKER, name)
    assert refused.value.reason == "NAME"


def test_a_name_covers_those_under_it() -> None:
    who = Identity("j", Role.SERVER, "ps")
    assert all(map(who.covers, ["ps", "ps-0", "ps/0", "ps.example"]))
    assert not any(map(who.covers, ["", "p", "psx", "ps0", "xps", "other/ps"]))


@given(IDENTITIES, st.integers(1, 2**60))
def test_ids_rise_and_know_their_owner(who: Identity, free: int) -> None:
    number = who.next_id(free)
    assert free <= number < free + (1 << MARK_BITS)
    assert who.owns(number)
    assert who.next_id(number) == number
    assert not who.owns(number + 1)
