"""Fixtures for all tests: clusters, and the hygiene of the test processes."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Before torch is imported anywhere: two test workers with one thread each use two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# A test must not find the cluster of whoever started the tests.
for _name in [name for name in os.environ if name.startswith("PARAMESH_")]:
    del os.environ[_name]

from hypothesis import HealthCheck, settings  # noqa: E402

from tests.cluster import etcd  # noqa: E402
from tests.cluster.handle import ClusterHandle  # noqa: E402
from tests.faults.matrix import rows_of  # noqa: E402

# An example that is slow because the machine is busy is no failure: no test depends on the clock.
# A failing one prints the blob that reproduces it.
settings.register_profile("paramesh", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("paramesh")

BACKENDS = ("inprocess", "processes")


def make_cluster(backend: str, **arguments: Any) -> ClusterHandle:
    """A cluster of one backend, not started."""
    if backend == "inprocess":
        from tests.cluster.inprocess import InProcessCluster

        return InProcessCluster(**arguments)
    from tests.cluster.processes import ProcessCluster

    return ProcessCluster(**arguments)


@pytest.fixture(params=BACKENDS)
def cluster_factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., ClusterHandle]]:
    """Start clusters of each backend; everything ends with the test, logs shown if it failed."""
    yield from _factory(request, request.param)


@pytest.fixture
def inprocess_cluster(request: pytest.FixtureRequest) -> Iterator[Callable[..., ClusterHandle]]:
    """Start clusters of threads: for what does not depend on processes, at a tenth of the time."""
    yield from _factory(request, "inprocess")


@pytest.fixture
def process_cluster(request: pytest.FixtureRequest) -> Iterator[Callable[..., ClusterHandle]]:
    """Start clusters of real processes, for faults that threads cannot have."""
    yield from _factory(request, "processes")


def _factory(request: pytest.FixtureRequest, backend: str) -> Iterator[Callable[..., ClusterHandle]]:
    started: list[ClusterHandle] = []

    def start(**arguments: Any) -> ClusterHandle:
        cluster = make_cluster(backend, **arguments)
        started.append(cluster)
        try:
            cluster.start()
        except BaseException:
            cluster.print_logs()
            raise
        return cluster

    start.backend = backend  # type: ignore[attr-defined]
    try:
        yield start
    finally:
        report = getattr(request.node, "report_of_call", None)
        for cluster in started:
            if report is not None and report.failed:
                cluster.print_logs()
            cluster.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep the outcome of the test's body where the fixtures above see it."""
    report = yield
    if report.when == "call":
        item.report_of_call = report  # type: ignore[attr-defined]
    report.user_properties.extend(("bad_input", row) for row in rows_of(item).items())
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    """The table of the bad-input matrix, and what tests/containers run on."""
    parser.addoption("--bad-input", action="store_true", help="run the bad-input matrix and print its table")
    parser.addoption("--backend", choices=["compose", "netns", "processes"], help="hosts for tests/containers")
    parser.addoption("--trimmed", action="store_true", help="of tests/containers those that fit into a CI run")


def pytest_configure(config: pytest.Config) -> None:
    """A hang shows where every thread stands (pytest-timeout uses it too)."""
    faulthandler.enable()
    if config.getoption("--bad-input") and not hasattr(config, "workerinput"):
        from tests.bad_input_report import BadInput

        config.pluginmanager.register(BadInput())  # where reports arrive: with xdist not where tests run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Soak tests run when asked for (`-m soak`), not by accident; those of etcd where etcd is, or when asked for.

    Those on several hosts need `--backend`.
    """
    asked = config.getoption("markexpr") or ""
    left_out = {"soak"} if "soak" not in asked else set()
    if not config.getoption("backend"):
        left_out.add("hosts")
    if "etcd" not in asked and not etcd.available():
        left_out.add("etcd")
    apart = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if config.getoption("--bad-input"):
        apart += [item for item in items if item not in apart and not rows_of(item)]
    config.hook.pytest_deselected(items=apart)
    items[:] = [item for item in items if item not in apart]
