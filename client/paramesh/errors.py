"""The errors of Paramesh, as one table with a machine key.

    ParameshError
     +-- ConfigError            a mistake in flags, environment or configuration
     +-- RequestRefused         wrong whatever the state: fix the call
     |    +-- TensorMismatch    shape, dtype, name or structure differs
     |    +-- UnsupportedOptimizer
     |    +-- AccessDenied      not who it says it is, or not allowed
     +-- StateRefused           wrong in this state: repeating alone does not help
     |    +-- ParametersChanged parameters were edited outside the optimizer
     |    +-- Fenced            this client was evicted: it rejoins as a new one
     +-- Retryable              the library repeats it by itself
     +-- Unavailable            something needed is not there
     |    +-- PartitionOffline  no live replica holds a partition
     |    +-- Timeout           a deadline passed; says what was waited for
     +-- InternalError          a bug; the whole story is in the server's log

Catch by class, decide by `reason`:

    try:
        optimizer.step()
    except paramesh.errors.PartitionOffline as error:
        print(error.reason, error.metadata["server"])

Servers raise with `refuse("DTYPE", "...")`; `paramesh.status` is the one door between
these and gRPC. This module imports nothing of gRPC, so that pure code may use it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = [
    "REASONS",
    "AccessDenied",
    "Action",
    "ConfigError",
    "Fenced",
    "InternalError",
    "ParameshError",
    "ParametersChanged",
    "PartitionOffline",
    "Reason",
    "RequestRefused",
    "Retryable",
    "StateRefused",
    "TensorMismatch",
    "Timeout",
    "Unavailable",
    "UnsupportedOptimizer",
    "refuse",
]


class ParameshError(Exception):
    """Base of every error that Paramesh raises on purpose.

    Attributes:
        reason: the machine key, such as `"STALE_EPOCH"`; a key of `REASONS`.
        code: the gRPC status code it travels as.
        metadata: named details, such as `{"table": "g0/0", "expected": "[3, 4]"}`.
    """

    def __init__(self, message: str, *, reason: str = "INTERNAL", metadata: dict[str, str] | None = None):
        super().__init__(message)
        self.reason = reason
        self.metadata: dict[str, str] = dict(metadata or {})

    @property
    def code(self) -> int:
        """The gRPC status code of the reason."""
        return REASONS[self.reason].code if self.reason in REASONS else INTERNAL

    @property
    def action(self) -> Action:
        """What a client does about it."""
        return REASONS[self.reason].action if self.reason in REASONS else Action.RAISE


class ConfigError(ParameshError):
    """A flag, variable or configuration key is wrong; commands exit with status 2."""

    def __init__(self, message: str, *, reason: str = "CONFIG", metadata: dict[str, str] | None = None):
        super().__init__(message, reason=reason, metadata=metadata)


class RequestRefused(ParameshError):
    """The request is wrong whatever the state of the cluster; nothing was changed."""


class TensorMismatch(RequestRefused):
    """A tensor's name, shape or dtype differs from what the table holds."""


class UnsupportedOptimizer(RequestRefused):
    """The optimizer is not one that servers can run with torch's own semantics."""


class AccessDenied(RequestRefused):
    """The caller could not prove who it is, or may not do this; nothing was changed."""


class StateRefused(ParameshError):
    """The request does not fit the state of the cluster; nothing was changed."""


class ParametersChanged(StateRefused):
    """Parameters were edited outside the optimizer; `paramesh.assign(model)` says it is meant."""


class Fenced(StateRefused):
    """This client was evicted: nothing it sends counts until it joins as a new client."""


class Retryable(ParameshError):
    """Not now, or not here: the library refreshes, waits and repeats."""


class Unavailable(ParameshError):
    """Something that the call needs is not there."""


class PartitionOffline(Unavailable):
    """No live replica holds a partition; names the lost server and the remedy."""


class Timeout(Unavailable):
    """A deadline passed; the message says what was waited for."""


class InternalError(ParameshError):
    """A bug on the other side; the id in the message finds it in the server's log."""


class Action(enum.Enum):
    """What a client does about a reason."""

    RAISE = "raise"
    """Give it to the user."""
    REFRESH = "refresh"
    """Fetch the map, repeat the same request (same seq)."""
    BACK_OFF = "back_off"
    """Wait as told or with back-off, repeat the same request."""
    REJOIN = "rejoin"
    """Register as a new client."""
    SUPPLY = "supply"
    """Give the partition what it lacks (decided steps, a contribution), repeat."""


# gRPC status codes, as numbers, so that this module needs no gRPC.
OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, ALREADY_EXISTS = 0, 3, 4, 5, 6
PERMISSION_DENIED, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED = 7, 8, 9, 10
OUT_OF_RANGE, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS = 11, 12, 13, 14, 15
UNAUTHENTICATED = 16


@dataclass(frozen=True)
class Reason:
    """One row of the table: how a reason travels and what it means to a client."""

    code: int
    action: Action
    error: type[ParameshError]
    meaning: str


def _row(code: int, action: Action, error: type[ParameshError], meaning: str) -> Reason:
    return Reason(code, action, error, meaning)


REASONS: dict[str, Reason] = {
    # Routing and fencing.
    "STALE_EPOCH": _row(FAILED_PRECONDITION, Action.REFRESH, Retryable, "the map is older than the partition"),
    "UNKNOWN_EPOCH": _row(UNAVAILABLE, Action.BACK_OFF, Retryable, "the server's map is older than the client's"),
    "NOT_PRIMARY": _row(FAILED_PRECONDITION, Action.REFRESH, Retryable, "another server is the primary"),
    "WRONG_PARTITION": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "no such partition in this job"),
    "PARTITION_OFFLINE": _row(UNAVAILABLE, Action.RAISE, PartitionOffline, "no live replica holds the partition"),
    "NOT_READY": _row(UNAVAILABLE, Action.BACK_OFF, Retryable, "starting, draining or waiting for servers"),
    "NOT_ENOUGH_REPLICAS": _row(UNAVAILABLE, Action.BACK_OFF, Retryable, "fewer in-sync replicas than min_isr"),
    "OVERLOADED": _row(RESOURCE_EXHAUSTED, Action.BACK_OFF, Retryable, "too much in flight; wait as told"),
    "INITIALISING": _row(UNAVAILABLE, Action.BACK_OFF, Retryable, "first values are not there yet"),
    # Identity.
    "WRONG_CLUSTER": _row(FAILED_PRECONDITION, Action.RAISE, StateRefused, "the address belongs to another job"),
    "OLD_GENERATION": _row(ABORTED, Action.RAISE, StateRefused, "the job was restored since; start anew"),
    "STALE_TERM": _row(FAILED_PRECONDITION, Action.RAISE, StateRefused, "a newer coordinator is in charge"),
    "CLIENT_FENCED": _row(FAILED_PRECONDITION, Action.REJOIN, Fenced, "this client was evicted"),
    "EVICTED": _row(FAILED_PRECONDITION, Action.REJOIN, Fenced, "this client was evicted from the ledger"),
    "NOT_MEMBER": _row(FAILED_PRECONDITION, Action.REJOIN, Fenced, "this client has not joined, or has left"),
    "VERSION": _row(FAILED_PRECONDITION, Action.RAISE, StateRefused, "incompatible wire protocol; upgrade one side"),
    "NODE_NAME": _row(ALREADY_EXISTS, Action.RAISE, StateRefused, "a live process has this name"),
    "ADDRESS": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "the advertised address cannot be dialled"),
    "INCARNATION": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "an incarnation must be a nonzero number"),
    "UNKNOWN_NODE": _row(NOT_FOUND, Action.RAISE, StateRefused, "that node never registered"),
    "UNAUTHENTICATED": _row(UNAUTHENTICATED, Action.RAISE, AccessDenied, "no valid token or certificate"),
    "PERMISSION_DENIED": _row(PERMISSION_DENIED, Action.RAISE, AccessDenied, "this identity may not do that"),
    # Sequence numbers.
    "SEQ_REUSED": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "a sequence number came with other bytes"),
    "SEQ_TOO_OLD": _row(ALREADY_EXISTS, Action.RAISE, StateRefused, "older than the window; applied long ago"),
    "SEQ_GAP": _row(ABORTED, Action.BACK_OFF, Retryable, "an earlier push has not come yet"),
    "LOG_GAP": _row(OUT_OF_RANGE, Action.SUPPLY, Retryable, "the record before is not here"),
    "DIVERGED": _row(FAILED_PRECONDITION, Action.SUPPLY, Retryable, "another record is applied here; send a snapshot"),
    "SEQ_TOO_FAR": _row(OUT_OF_RANGE, Action.RAISE, RequestRefused, "more than five pushes ahead"),
    "FLOOR": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "a floor that no log can reach soon"),
    # Steps.
    "NEED_STEPS": _row(FAILED_PRECONDITION, Action.SUPPLY, Retryable, "the partition lacks decided steps"),
    "NOT_STAGED": _row(FAILED_PRECONDITION, Action.SUPPLY, Retryable, "a contribution named in the step is missing"),
    "TOO_LATE": _row(FAILED_PRECONDITION, Action.RAISE, StateRefused, "the step was decided without this contribution"),
    "STEP_OUT_OF_RANGE": _row(OUT_OF_RANGE, Action.RAISE, StateRefused, "the step is not the next one"),
    "WAITING_FOR_WORKERS": _row(UNAVAILABLE, Action.BACK_OFF, Retryable, "other workers are awaited"),
    "CLOCK": _row(OUT_OF_RANGE, Action.RAISE, RequestRefused, "the clock is not the next one"),
    "LEASE": _row(FAILED_PRECONDITION, Action.RAISE, StateRefused, "the sample range is not leased to this worker"),
    "SAMPLE_RANGE": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "a range of samples ends where it begins"),
    "SAMPLE_OUT_OF_RANGE": _row(OUT_OF_RANGE, Action.RAISE, RequestRefused, "a range of samples ends beyond its epoch"),
    # Payloads and schemas.
    "UNKNOWN_TABLE": _row(NOT_FOUND, Action.RAISE, RequestRefused, "no such table"),
    "UNKNOWN_GROUP": _row(NOT_FOUND, Action.RAISE, RequestRefused, "no such table group"),
    "TENSOR_MISMATCH": _row(INVALID_ARGUMENT, Action.RAISE, TensorMismatch, "the model differs from the others'"),
    "DTYPE": _row(INVALID_ARGUMENT, Action.RAISE, TensorMismatch, "unknown or unexpected element type"),
    "SHAPE": _row(INVALID_ARGUMENT, Action.RAISE, TensorMismatch, "impossible or unexpected shape"),
    "PAYLOAD_SIZE": _row(INVALID_ARGUMENT, Action.RAISE, TensorMismatch, "bytes do not match what is declared"),
    "CODEC": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "unknown or broken encoding"),
    "CRC": _row(DATA_LOSS, Action.BACK_OFF, Retryable, "bytes were damaged on the way"),
    "NON_FINITE": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "a gradient holds NaN or infinity"),
    "NAME": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "a name must match [A-Za-z0-9_.:/-]{1,256}, no '..'"),
    "SCHEMA": _row(ALREADY_EXISTS, Action.RAISE, StateRefused, "exists already with another schema"),
    "QUOTA": _row(RESOURCE_EXHAUSTED, Action.RAISE, StateRefused, "a stated limit would be passed"),
    "UNSUPPORTED_OPTIMIZER": _row(
        INVALID_ARGUMENT, Action.RAISE, UnsupportedOptimizer, "servers cannot run this optimizer"
    ),
    "HYPER_PARAMETER": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "torch refuses this hyper-parameter"),
    "MISSING_FIELD": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "a required field is zero or absent"),
    "WEIGHT": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "a weight must be finite, > 0 and <= 1e15"),
    "PARAMETERS_CHANGED": _row(
        FAILED_PRECONDITION,
        Action.RAISE,
        ParametersChanged,
        "parameters were edited; call paramesh.assign(model)",
    ),
    "PATH": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "a path leaves its root or cannot be used"),
    "FORMAT": _row(INVALID_ARGUMENT, Action.RAISE, RequestRefused, "not a format that is read here"),
    "DAMAGED": _row(DATA_LOSS, Action.RAISE, RequestRefused, "a stored file is not what was written"),
    "NOT_FOUND": _row(NOT_FOUND, Action.RAISE, StateRefused, "not there"),
    "UNIMPLEMENTED": _row(UNIMPLEMENTED, Action.RAISE, RequestRefused, "this release does not have it"),
    "DEADLINE": _row(DEADLINE_EXCEEDED, Action.RAISE, Timeout, "a deadline passed"),
    "INTERNAL": _row(INTERNAL, Action.RAISE, InternalError, "a bug; the id finds it in the server's log"),
    "STATE_TOO_LARGE": _row(RESOURCE_EXHAUSTED, Action.RAISE, RequestRefused, "small state is at most 4 MiB a key"),
    # Never on the wire.
    "CONFIG": _row(INVALID_ARGUMENT, Action.RAISE, ConfigError, "a flag, variable or key is wrong"),
    "UNREACHABLE": _row(UNAVAILABLE, Action.RAISE, Unavailable, "no process answers at the address"),
    "FORKED": _row(FAILED_PRECONDITION, Action.RAISE, StateRefused, "a session cannot be used in a forked child"),
}


def refuse(reason: str, message: str, **metadata: object) -> ParameshError:
    """Make the typed error of a reason; the caller raises it.

    Args:
        reason: a key of `REASONS`.
        message: one sentence that names the field, the value and the remedy.
        metadata: named details; values are turned into strings.
    """
    return REASONS[reason].error(message, reason=reason, metadata={key: str(value) for key, value in metadata.items()})
