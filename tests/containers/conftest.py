"""The backend of a run, a cluster of it for each scenario, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.containers import backends
from tests.containers.hosts import HostCluster


@pytest.fixture
def cluster_of(request: pytest.FixtureRequest) -> Iterator[Callable[..., HostCluster]]:
    """Start clusters of the backend that was asked for; they end with the scenario, logs shown if it failed."""
    backend = backends.chosen(request.config)
    started: list[HostCluster] = []

    def start(**arguments: Any) -> HostCluster:
        cluster = backend.make(**arguments)
        started.append(cluster)
        try:
            cluster.start()
        except BaseException:
            cluster.print_logs()
            raise
        return cluster

    try:
        yield start
    finally:
        report = getattr(request.node, "report_of_call", None)
        for cluster in started:
            if report is not None and report.failed:
                cluster.print_logs()
            cluster.stop()


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Put figures into the scenario's line of the table."""

    def put(**figures: object) -> None:
        request.node.user_properties.extend(figures.items())
        print(*(f"{key}={value}" for key, value in figures.items()))

    return put


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Scenarios that need wires, or containers, are left out where there are none, before anything is started."""
    if not config.getoption("backend"):
        return
    lacks = [*backends.LACKS[config.getoption("backend")], *(["long"] if config.getoption("trimmed") else [])]
    apart = [item for item in items if any(item.get_closest_marker(name) for name in lacks)]
    config.hook.pytest_deselected(items=apart)
    items[:] = [item for item in items if item not in apart]
    for item in items:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(300))
    if items and not config.getoption("collectonly"):
        backends.chosen(config)  # before any scenario's time begins: images may have to be built


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of scenarios, and which backend they ran on."""
    if not config.getoption("backend"):
        return
    reports = [
        report
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, [])
        if "tests/containers/" in report.nodeid and (report.when == "call" or report.outcome != "passed")
    ]
    terminalreporter.section("scenarios")
    for report in reports:
        figures = " ".join(f"{key}={value}" for key, value in report.user_properties)
        name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        terminalreporter.write_line(f"{report.outcome:7} {report.duration:6.1f} s  {name}  {figures}")
    took = time.monotonic() - config.stash[backends.BEGAN]
    terminalreporter.write_line(f"backend: {backends.chosen(config).title}; {len(reports)} scenarios in {took:.0f} s")


def pytest_configure(config: pytest.Config) -> None:
    """When it began."""
    config.stash[backends.BEGAN] = time.monotonic()
