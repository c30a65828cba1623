"""Summary of the suites that ran, and why others did not; in CI, a run fails if a suite is missing that should have run."""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from _pytest.mark.expression import Expression

from widekernel.ops.cpu import library


@dataclass(frozen=True)
class Suite:
    """Tests that need something that a machine may lack.

    Args:
        name: what the summary calls it
        marker: the marker of its tests, or ""
        folder: the folder or file of its tests, or ""
        should_run: whether this machine has, or should have, what it needs
        how: the command that runs it, where it is left out by default
    """

    name: str
    marker: str = ""
    folder: str = ""
    should_run: Callable[[], bool] = lambda: False
    how: str = ""

    def holds(self, item: pytest.Item) -> bool:
        """Return whether a test belongs to the suite."""
        return item.get_closest_marker(self.marker) is not None if self.marker else item.nodeid.startswith(self.folder)


def _has_triton() -> bool:
    return sys.platform == "linux"  # where PyTorch installs it


def _has_native() -> bool:
    return library.load().wanted  # a machine without a compiler has none, and the summary says so


def _has_references() -> bool:
    from tests.conftest import shared_folder

    return shared_folder() is not None


SUITES = (
    Suite("GPU kernels", marker="interpreted", should_run=_has_triton),
    Suite("native CPU kernels", folder="tests/ops/cpu/test_native.py", should_run=_has_native),
    Suite("reference numbers", folder="tests/parity/", should_run=_has_references),
    Suite("slow", marker="slow", how="make test-all"),
    Suite("full-size models", marker="full", how="make test-all"),
    Suite("several processes", marker="dist", how="make test-all"),
    Suite("other libraries", marker="clients", how="make test-clients"),
    Suite("compiled GPU kernels", marker="gpu", how="make test-gpu, on a machine with an NVIDIA GPU"),
)


@dataclass
class Tally:
    """Outcomes of the tests of one suite, and reasons why some were skipped."""

    ended: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)

    @property
    def ran(self) -> bool:
        return self.ended["passed"] + self.ended["failed"] > 0


class SuiteReport:
    """Plugin that counts tests by suite, prints the counts, and in CI fails a run that left out a suite."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.tallies: dict[str, Tally] = defaultdict(Tally)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # Reports of other processes carry their properties.
        for item in items:
            item.user_properties += [("suite", suite.name) for suite in SUITES if suite.holds(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        for tally in (self.tallies[value] for name, value in report.user_properties if name == "suite"):
            tally.ended[report.outcome] += 1
            if report.skipped and isinstance(report.longrepr, tuple):
                tally.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def selected(self, suite: Suite) -> bool:
        """Return whether the marker expression of this run selects tests of the suite."""
        expression = self.config.option.markexpr
        return not expression or Expression.compile(expression).evaluate(lambda name, **_: name == suite.marker)

    def missing(self) -> list[Suite]:
        """List the suites that should have run and did not; in a run of some files only, those that were skipped."""
        everything = (
            self.config.args_source == pytest.Config.ArgsSource.TESTPATHS
            and not self.config.option.keyword
            and not self.config.option.collectonly
        )
        wanted = [suite for suite in SUITES if self.selected(suite) and suite.should_run()]
        return [
            suite
            for suite in wanted
            if not self.tallies[suite.name].ran and (everything or self.tallies[suite.name].ended["skipped"])
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        controls = not hasattr(self.config, "workerinput")
        if controls and os.environ.get("CI") and self.missing() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("suites")
        for suite in SUITES:
            terminalreporter.line(f"{suite.name + ':':22}{self._line(suite)}")
        for suite in self.missing():
            verdict = "which fails this run, because CI is set" if os.environ.get("CI") else "with CI set that fails the run"
            terminalreporter.line(f"The suite {suite.name!r} should to run here and did not, {verdict}.", red=True)

    def _line(self, suite: Suite) -> str:
        tally = self.tallies[suite.name]
        if not tally.ended:
            why = "has no tests among those chosen" if self.selected(suite) else "left out by the marker expression"
            return f"did not run: {why}{': ' + suite.how if suite.how else ''}"
        counts = ", ".join(f"{number:,} {outcome}" for outcome, number in sorted(tally.ended.items()))
        reasons = "; ".join(f"{reason} ({number:,})" for reason, number in tally.reasons.most_common(3))
        return ("" if tally.ran else "did not run: ") + counts + (f": {reasons}" if reasons else "")
