"""Which calls may be repeated, and how long to wait in between.

Every call of the contract is repeatable, each for its own reason; a new one must be
listed here with its reason, and a test holds the table against the descriptors.
"""

from __future__ import annotations

import random

from paramesh.errors import ParameshError

TOLD_MAX_S = 10.0
"""Nobody is told to wait longer, whoever tells."""

REPEATABLE: dict[str, str] = {
    "ParameterServer.Push": "staged: by (step, attempt); sequenced: by seq and digest",
    "ParameterServer.Pull": "reads",
    "ParameterServer.Assign": "by (client, assign_id)",
    "ParameterServer.Snapshot": "reads",
    "ParameterServer.Norms": "reads; the sum is a function of the step's record",
    "ParameterServer.Inspect": "reads",
    "Ledger.Join": "a member keeps its rank",
    "Ledger.Leave": "leaving twice is leaving",
    "Ledger.SetActivity": "sets a value",
    "Ledger.OpenGroup": "by (name, digest)",
    "Ledger.AwaitInit": "the owner stays the owner",
    "Ledger.CommitInit": "by attempt",
    "Ledger.Ready": "by (step, attempt); a decided step answers its record",
    "Ledger.Clip": "norms are a function of the step",
    "Ledger.Clock": "by the clock's number",
    "Ledger.GetSteps": "reads",
    "Ledger.ReportMissing": "adds to a set",
    "Ledger.Lease": "an answer that was lost comes back at eviction or when asked again",
    "Ledger.ReturnLeases": "returning twice is returning",
    "Ledger.PutState": "by version",
    "Ledger.GetState": "reads",
    "Ledger.Gather": "by (name, round)",
    "Ledger.Report": "the latest counts",
    "Ledger.LedgerStatus": "reads",
    "Membership.RegisterServer": "by (name, incarnation)",
    "Membership.RegisterHost": "by (name, incarnation)",
    "Membership.RegisterClient": "by (slot, incarnation)",
    "Membership.Heartbeat": "beats",
    "Membership.ReportExit": "a dead process stays dead",
    "Membership.Deregister": "leaving twice is leaving",
    "MapService.GetMap": "reads",
    "MapService.WatchMap": "reads",
    "Catalog.CreateTable": "by (name, schema digest)",
    "Catalog.DescribeTable": "reads",
    "Replicas.ChangeIsr": "by the row's version",
    "Replicas.ReportLoss": "a total that is known changes nothing",
    "Admin.GetStatus": "reads",
    "Admin.ListEvents": "reads",
    "Admin.PromoteReplica": "by the epoch: the second is refused, the partition is online",
    "Admin.MovePartition": "an open move is returned as it is",
    "Admin.Rebalance": "what is even, or on its way, is not planned again",
    "Admin.ListMoves": "reads",
    "Admin.Drain": "sets a value",
    "Recovery.Testify": "reads",
    "Replication.Append": "by (epoch, lsn)",
    "Replication.Install": "replaces",
    "Replication.Handover": "by (step, client, attempt) and digest",
    "ServerControl.Fence": "a tombstone is for ever",
    "ServerControl.Evict": "a tombstone is for ever",
    "ServerControl.BecomePrimary": "by epoch",
}

CONSUMED = frozenset({"CODEC", "PAYLOAD_SIZE", "TENSOR_MISMATCH", "HYPER_PARAMETER", "WEIGHT", "NON_FINITE"})
"""Reasons for which a sequenced push can never be applied, however often it comes: the server puts
a NOOP in its place, the client goes on with the next seq. Both sides read this one list: if they
differed, the next push would come under a number that is taken."""


def told_to_wait(error: ParameshError) -> float:
    """Seconds that a refusal asks its caller to wait; 0 if it does not say.

    With up to half more by chance: those who were refused together do not come back together.
    """
    try:
        told = float(error.metadata.get("retry_after_ms", "0")) / 1000
    except ValueError:
        return 0.0
    return min(max(told, 0.0), TOLD_MAX_S) * random.uniform(1.0, 1.5)


class Backoff:
    """Waits of 50 ms doubling to 2 s, each with jitter down to half of it.

    Args:
        first: seconds of the first wait: a failover is under way, not over.
        cap: seconds at most: half of the time in which a lost server must be named.
    """

    def __init__(self, first: float = 0.05, cap: float = 2.0):
        self._first = self._next = first
        self._cap = cap

    def reset(self) -> None:
        """What was waited for has come: the next wait is for something else."""
        self._next = self._first

    def next(self) -> float:
        """Seconds to wait now."""
        wait = self._next
        self._next = min(self._cap, wait * 2)
        return wait * random.uniform(0.5, 1.0)
