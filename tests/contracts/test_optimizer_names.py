"""Client, coordinator and servers agree on which optimizers there are."""

from __future__ import annotations

from paramesh.options import SUPPORTED
from paramesh.routing import OPTIMIZERS
from paramesh_server.optimizer import FUSED, LOOP


def test_the_three_lists_are_one():
    assert {cls.__name__ for cls in SUPPORTED} == set(OPTIMIZERS) == {*FUSED, *LOOP}
