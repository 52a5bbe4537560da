"""The Prometheus page of a server: what `Counters` and the partitions say, when scraped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from paramesh.admission import Admission
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from paramesh_server.counters import Counters
from paramesh_server.process import rss_bytes
from paramesh_server.room import Room
from paramesh_server.shards import Shards
from paramesh_server.staging import Budget


class Seen(NamedTuple):
    """What the page shows."""

    counters: Counters
    shards: Shards
    budget: Budget
    admission: Admission
    room: Room


class _Collector:
    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def collect(self) -> Iterator[Metric]:
        counters, calls, room = self._seen.counters, self._seen.admission, self._seen.room
        partitions = [held.partition for held in list(self._seen.shards.held.values())]
        totals = {
            "paramesh_server_received_bytes": ("Payload bytes of pushes and assigns.", counters.bytes_in),
            "paramesh_server_sent_bytes": ("Encoded bytes of pulls and snapshots.", counters.bytes_out),
            "paramesh_server_pushes": ("Contributions staged and updates applied.", counters.pushes),
            "paramesh_server_duplicates": ("Requests that had been applied before.", counters.duplicates),
            "paramesh_server_encodings": ("Encodings of values; pulls share them.", counters.encodings),
            "paramesh_server_tls_handshakes": (
                "TLS handshakes begun, whether they failed or not.",
                counters.tls_handshakes,
            ),
            "paramesh_server_refused_calls": ("Calls turned away before they were read.", calls.refused),
            "paramesh_server_malformed_calls": ("Calls that brought no message.", calls.offenders.offences),
            "paramesh_server_connections_cut": ("Connections closed for such calls.", calls.offenders.cuts),
            "paramesh_server_replica_divergence": ("Replicas found to differ from their primary.", counters.diverged),
        }
        for name, (help_text, value) in totals.items():
            yield CounterMetricFamily(name, help_text, value=value)
        refused = CounterMetricFamily("paramesh_server_refused", "Refusals by reason.", labels=["reason"])
        for reason, count in list(counters.refused.items()):
            refused.add_metric([reason], count)
        yield refused
        gauges: dict[str, tuple[str, float]] = {
            "paramesh_server_staged_bytes": ("Bytes of contributions that wait.", self._seen.budget.used),
            "paramesh_server_calls": ("Calls under way.", sum(calls.calls.values())),
            "paramesh_server_uploads": ("Calls whose request is not here in full.", calls.uploads),
            "paramesh_server_memory_tight": ("1: above the memory watermark.", int(room.tight)),
            "paramesh_server_memory_used_bytes": ("What counts against the watermark.", room.headroom.used),
            "paramesh_server_memory_limit_bytes": ("Of the container, else of the machine.", room.headroom.limit),
            "paramesh_server_in_flight_bytes": ("Bytes of unfinished requests.", counters.in_flight),
            "paramesh_server_value_bytes": ("Bytes of values held.", sum(p.layout.nbytes for p in partitions)),
            "paramesh_server_partitions": ("Partitions held.", len(partitions)),
            "paramesh_server_resident_bytes": ("Memory of the process.", rss_bytes()),
        }
        for name, (help_text, level) in gauges.items():
            yield GaugeMetricFamily(name, help_text, value=level)
        yield CounterMetricFamily(
            "paramesh_server_non_finite_skipped",
            "Sequenced updates skipped for a NaN or an infinity, over all partitions held.",
            value=sum(p.non_finite for p in partitions),
        )
        yield CounterMetricFamily(
            "paramesh_server_lost_updates",
            "Acknowledged updates that went with primaries (acks=primary), over all partitions held.",
            value=sum(p.lost for p in partitions),
        )
        yield CounterMetricFamily(
            "paramesh_server_steps_applied",
            "Steps applied, over all partitions held.",
            value=sum(p.applied_step for p in partitions),
        )


def serve_metrics(host: str, port: int, seen: Seen) -> Any:
    """Serve the page in a thread; returns what has a `shutdown()`.

    Raises:
        OSError: the port cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(seen))
    server, _ = start_http_server(port, addr=host.strip("[]"), registry=registry)
    return server
