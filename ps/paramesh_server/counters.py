"""What a server counts: for metrics, heartbeats and people. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """Totals since the process started; written by the servicer on the event loop."""

    bytes_in: int = 0
    """Payload bytes received in pushes and assigns."""
    bytes_out: int = 0
    """Encoded bytes sent in pulls and snapshots."""
    pushes: int = 0
    """Contributions staged and updates applied."""
    duplicates: int = 0
    """Of the requests, those that had been applied or staged before."""
    encodings: int = 0
    """How often values were encoded; pulls of one state share one."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reason -> refusals, of whole calls and of single partitions."""
    tls_handshakes: int = 0
    """TLS handshakes that were begun, on both ports; gRPC does not say how they ended."""
    diverged: int = 0
    """Replicas here whose state was found to differ from their primary's."""
    in_flight: int = 0
    """Payload bytes of pushes and assigns that are not staged, applied or dropped yet."""
