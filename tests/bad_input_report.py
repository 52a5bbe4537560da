"""A pytest plugin: the table of the bad-input matrix, from the reports of a run."""

from __future__ import annotations

import pytest

from tests.faults.matrix import Table


class BadInput:
    """Collects reports, prints the table, and fails the run if a row is not shown."""

    def __init__(self) -> None:
        self.table = Table()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test ended, or failed before it began."""
        properties = list(report.user_properties)
        if report.when != "call" and not report.failed:
            return
        rows = [value for name, value in properties if name == "bad_input"]
        said = next((str(value) for name, value in properties if name == "got"), "")
        for number, got in rows:
            self.table.note(number, said or got, report.nodeid.rpartition("::")[2] if report.failed else "")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print it."""
        terminalreporter.section("the bad-input matrix")
        for line in self.table.lines():
            terminalreporter.write_line(line)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A row without a test is a failure too."""
        if self.table.missing() and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
