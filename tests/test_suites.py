"""Summary of suites: counts, reasons, and failure of a run in CI that left out a suite."""

from __future__ import annotations

import pytest

from tests import suites
from tests.suites import Suite, SuiteReport

pytest_plugins = ["pytester"]

PASSING = "import pytest\n@pytest.mark.kernels\ndef test_it(): pass\ndef test_other(): pass\n"
SKIPPED = "import pytest\n@pytest.mark.kernels\ndef test_it(): pytest.skip('no compiler')\ndef test_other(): pass\n"
OTHERS = "def test_other(): pass\n"
FAILED, LINE = pytest.ExitCode.TESTS_FAILED, "The suite 'kernels' should to run here and did not"


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Run one test file with a suite that should run, or need not, and return the exit status."""

    def running(source: str, *arguments: str, ci: bool = True, should: bool = True) -> int:
        monkeypatch.setattr(suites, "SUITES", (Suite("kernels", marker="kernels", should_run=lambda: should, how="make x"),))
        monkeypatch.setenv("CI", "true") if ci else monkeypatch.delenv("CI", raising=False)
        pytester.makeini("[pytest]\ntestpaths = there\nmarkers = kernels: needs a compiler\n")
        folder = pytester.mkdir("there")
        (folder / "test_suite.py").write_text(source)

        class Plugin:
            def pytest_configure(self, config: pytest.Config) -> None:
                config.pluginmanager.register(SuiteReport(config))

        done = pytester.inline_run("-p", "no:randomly", *arguments, plugins=[Plugin()])
        return done.ret

    return running


def test_a_suite_that_ran(run, capsys: pytest.CaptureFixture) -> None:
    assert run(PASSING) == pytest.ExitCode.OK
    assert "kernels:              1 passed" in capsys.readouterr().out


@pytest.mark.parametrize("source", [SKIPPED, OTHERS], ids=["skipped", "absent"])
def test_a_suite_that_should_have_run_fails_the_run_in_ci_only(source: str, run, capsys: pytest.CaptureFixture) -> None:
    assert run(source) == FAILED
    out = capsys.readouterr().out
    assert f"{LINE}, which fails this run, because CI is set." in out
    assert ("did not run: 1 skipped: no compiler (1)" in out) == (source == SKIPPED)


def test_without_ci_a_suite_that_did_not_run_is_only_reported(run, capsys: pytest.CaptureFixture) -> None:
    assert run(SKIPPED, ci=False) == pytest.ExitCode.OK
    assert f"{LINE}, with CI set that fails the run." in capsys.readouterr().out


def test_a_suite_that_need_not_run(run, capsys: pytest.CaptureFixture) -> None:
    assert run(SKIPPED, should=False) == pytest.ExitCode.OK
    assert LINE not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("-m", "not kernels"), ("there/test_suite.py",), ("-k", "other")], ids=" ".join)
def test_partial_runs_need_not_contain_every_suite(arguments: tuple, run, capsys: pytest.CaptureFixture) -> None:
    source = PASSING if "-m" in arguments or "-k" in arguments else OTHERS
    assert run(source, *arguments) == pytest.ExitCode.OK
    out = capsys.readouterr().out
    assert "did not run: " in out and LINE not in out
    assert ("left out by the marker expression: make x" in out) == ("-m" in arguments)
