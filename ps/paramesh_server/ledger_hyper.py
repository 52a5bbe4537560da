"""Hyper-parameters of a step: whose hold, what changed, who disagrees. Pure.

A Ready carries what changed since its member's last one, so the ledger keeps each member's
own view; those of the longest-joined contributor hold, and a STEP carries the difference
against what earlier steps committed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from paramesh.errors import refuse
from paramesh.v1.types_pb2 import HyperParameter, TableHyperParameters

from paramesh_server.ledger_groups import Setting

Settings = Mapping[Setting, HyperParameter]

MAX_SETTINGS = 10_000
"""Settings in one Ready: 1,000 param groups of ten each; more is a flood."""


def check(tables: Sequence[TableHyperParameters]) -> None:
    """Refuse settings that are not finite or not named.

    Raises:
        RequestRefused: HYPER_PARAMETER.
        StateRefused: QUOTA.
    """
    if sum(len(table.hyper_parameters) for table in tables) > MAX_SETTINGS:
        raise refuse("QUOTA", f"at most {MAX_SETTINGS} hyper-parameters in one Ready")
    for table in tables:
        for setting in table.hyper_parameters:
            kind = setting.WhichOneof("value")
            if not setting.name or len(setting.name) > 256 or kind is None:
                raise refuse("HYPER_PARAMETER", f"hyper-parameter {setting.name[:80]!r} has no name or no value")
            numbers = [setting.number] if kind == "number" else setting.numbers.numbers if kind == "numbers" else ()
            if not all(math.isfinite(number) for number in numbers):
                raise refuse(
                    "HYPER_PARAMETER",
                    f"hyper-parameter {setting.name} of table {table.table_id} is not finite",
                    name=setting.name,
                )


def merged(settings: Settings, tables: Iterable[TableHyperParameters]) -> dict[Setting, HyperParameter]:
    """A member's view after a Ready."""
    result = dict(settings)
    for table in tables:
        for setting in table.hyper_parameters:
            result[table.table_id, setting.name] = setting
    return result


def difference(committed: Settings, wanted: Settings) -> list[TableHyperParameters]:
    """What a STEP must carry so that `committed` becomes `wanted`, by table, sorted by name."""
    changed: dict[int, list[HyperParameter]] = {}
    for (table, _), setting in sorted(wanted.items(), key=lambda item: item[0]):
        if committed.get((table, setting.name)) != setting:
            changed.setdefault(table, []).append(setting)
    return [TableHyperParameters(table_id=table, hyper_parameters=settings) for table, settings in changed.items()]


def first_disagreement(views: Mapping[int, Settings], leader: int) -> tuple[int, Setting] | None:
    """A member, and a setting that it has otherwise than the leader; None if all agree."""
    holding = views[leader]
    for client_id, view in views.items():
        for key, setting in view.items():
            if key in holding and holding[key] != setting:
                return client_id, key
    return None
