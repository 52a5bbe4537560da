"""Tokens: what is signed is verified, and nothing else is."""

import base64
import hmac
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paramesh.errors import AccessDenied, ConfigError
from paramesh.identity import Identity, Role
from paramesh.tokens import LONGEST_S, SKEW_S, TokenKeys, claimed

NOW = 1_800_000_000.0
ME = Identity("run-7", Role.WORKER, "host-a")
KEYS = TokenKeys({"k1": b"1" * 32, "k0": b"0" * 32})
GOOD = KEYS.sign(ME, NOW + 60)


def test_what_is_signed_is_verified() -> None:
    assert KEYS.verify(GOOD, NOW) == (ME, NOW + 60)
    assert claimed(GOOD) == ME


def test_both_keys_verify_and_the_first_signs() -> None:
    older = TokenKeys({"k0": b"0" * 32})
    assert KEYS.verify(older.sign(ME, NOW + 60), NOW)[0] == ME
    with pytest.raises(AccessDenied):
        older.verify(GOOD, NOW)


@pytest.mark.parametrize("expires", [NOW - 1, NOW, NOW + LONGEST_S + SKEW_S + 1])
def test_the_time_of_a_token_is_now_and_at_most_a_day(expires: float) -> None:
    with pytest.raises(AccessDenied):
        KEYS.verify(KEYS.sign(ME, expires), NOW)


def test_the_longest_token_is_good_also_beside_a_slow_clock() -> None:
    assert KEYS.verify(KEYS.sign(ME, NOW + LONGEST_S), NOW - SKEW_S)[0] == ME


@given(st.integers(0, len(GOOD) - 1), st.characters())
def test_no_other_character_anywhere_passes(at: int, other: str) -> None:
    token = GOOD[:at] + other + GOOD[at + 1 :]
    if token != GOOD:
        with pytest.raises(AccessDenied) as refused:
            KEYS.verify(token, NOW)
        assert refused.value.reason == "UNAUTHENTICATED"


@given(st.lists(st.tuples(st.integers(0, 400), st.text(max_size=5)), max_size=6), st.integers(0, 400))
def test_no_mutation_raises_anything_but_a_refusal(edits: list[tuple[int, str]], end: int) -> None:
    token = GOOD
    for at, text in edits:
        token = token[:at] + text + token[at:]
    token = token[:end] if end else token
    if token != GOOD:
        with pytest.raises(AccessDenied):
            KEYS.verify(token, NOW)


@given(st.text() | st.binary().map(lambda data: "pm1." + base64.urlsafe_b64encode(data).decode() + ".x"))
def test_no_text_raises_anything_but_a_refusal(token: str) -> None:
    with pytest.raises(AccessDenied):
        KEYS.verify(token, NOW)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(JSONS, st.dictionaries(st.sampled_from(["exp", "job", "kid", "name", "role"]), JSONS))
def test_no_payload_raises_anything_but_a_refusal(whole: object, fields: dict[str, object]) -> None:
    """Also one that is signed with the right key."""
    for said in (whole, {"exp": int(NOW) + 5, "job": "j", "kid": "k1", "name": "n", "role": "root"} | fields):
        payload = base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode()
        mac = hmac.digest(b"1" * 32, f"pm1.{payload}".encode(), "sha256")
        token = f"pm1.{payload}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
        try:
            who, until = KEYS.verify(token, NOW)
        except AccessDenied:
            continue
        assert {"job": who.job, "name": who.name, "role": str(who.role), "exp": until}.items() <= said.items()


def test_a_refusal_does_not_repeat_the_token() -> None:
    for token in (GOOD[:-1] + "x", TokenKeys.fresh().sign(ME, NOW + 60), KEYS.sign(ME, NOW - 5)):
        with pytest.raises(AccessDenied) as refused:
            KEYS.verify(token, NOW)
        assert token.rpartition(".")[2] not in str(refused.value)
        assert token.split(".")[1] not in str(refused.value)


def test_keys_are_not_shown() -> None:
    assert "1111" not in repr(KEYS)


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "k1 short", "k1 AAAA", "k1", "k1 !!!!", f"k1 {'A' * 44}\nk1 {'A' * 44}", "k/1 " + "A" * 44,
     "\n".join(f"k{i} {'A' * 44}" for i in range(3))],
)  # fmt: skip
def test_wrong_key_files(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        TokenKeys.parse(text)
    assert refused.value.metadata["key"] == "token_keys"
    assert "AAAA" not in str(refused.value)


def test_rotation_keeps_the_newest_older_key() -> None:
    first = TokenKeys.fresh()
    second = TokenKeys.fresh(first)
    third = TokenKeys.fresh(second)
    assert TokenKeys.parse(third.text()) == third
    assert list(third.keys)[1] == next(iter(second.keys))
    assert second.verify(first.sign(ME, NOW + 5), NOW)[0] == ME
    with pytest.raises(AccessDenied):
        third.verify(first.sign(ME, NOW + 5), NOW)
