"""Broken configurations are refused before the data are opened, within two seconds, with the name of the setting.

    python -m pytest -m "slow or not slow" -s -n 0 tests/faults/test_broken_configurations.py

prints how many were refused; `broken_configurations.py` makes them from the types of all settings. Contradictions are
written by hand.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from tests.faults.broken_configurations import Broken, contradictions, generated, leaves

from widekernel.cli.main import main
from widekernel.tasks.classification import run as run_module

LIMIT_S = 2.0
FILE = "settings.yaml"


class DataOpenedError(BaseException):
    """Raised in place of opening the data: the configuration was accepted."""


def some() -> list[Broken]:
    """Return one case of every kind, each of another setting, and every fifth contradiction."""
    kinds: dict[str, list[Broken]] = {}
    for broken in generated():
        kinds.setdefault(broken.kind, []).append(broken)
    of_kinds = [cases[7 * number % len(cases)] for number, cases in enumerate(kinds.values())]
    return [*of_kinds, *islice(contradictions(), 0, None, 5)]


def refusal(broken: Broken, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command; return what is wrong with how it refuses the configuration, "" if nothing is."""
    arguments = broken.arguments()
    if broken.file is not None:
        (folder / FILE).write_text(broken.file)
        arguments += ["--config", FILE]
    start = time.process_time()  # other programs may use the processors, too
    try:
        code = main(arguments)
    except BaseException as error:
        return f"{type(error).__name__} {error}"
    seconds = time.process_time() - start
    shown = capsys.readouterr()
    left = [path.name for path in folder.rglob("*") if path.name != FILE]
    missing = [word for word in (broken.key, *broken.words) if word not in shown.err]
    if code != 2 or not shown.err.startswith("error: ") or "Traceback" in shown.err:
        return f"exit code {code}, {shown.err}"
    if missing or left or shown.out or seconds > LIMIT_S:
        return f"without {missing}, leaves {left}, writes {shown.out!r}, takes {seconds:.1f} s: {shown.err}"
    return ""


@pytest.mark.parametrize("cases", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_they_are_refused(
    cases: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def accepted(*_: object, **__: object) -> None:
        raise DataOpenedError("was accepted")

    monkeypatch.chdir(tmp_path)
    for name in ("widekernel.cli.train.submit_training", "widekernel.launch.local.subprocess.Popen"):
        monkeypatch.setattr(name, accepted)
    opened = run_module.open_train_and_val
    every = some() if cases == "some" else [*generated(), *contradictions()]
    faults = []
    for broken in every:
        monkeypatch.setattr(run_module, "open_train_and_val", opened if broken.opens_data else accepted)
        fault = refusal(broken, tmp_path, capsys)
        faults += [f"{broken.name}: {fault}"] if fault else []
    with capsys.disabled():
        print(f"\n{len(every) - len(faults)} of {len(every)} broken configurations of {len(leaves())} settings refused")
    assert len(every) >= (25 if cases == "some" else 900) and not faults, "\n".join(faults)


def test_the_configuration_that_they_break_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accepted(*_: object) -> None:
        raise DataOpenedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "open_train_and_val", accepted)
    with pytest.raises(DataOpenedError):
        main(Broken("nothing", "", {}).arguments())


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_so_does_a_process_of_its_own(number: int, tmp_path: Path) -> None:
    """Settings are checked without PyTorch, so a process that has to start is fast, too."""
    broken = [each for each in generated() if each.kind == "out of range"][11 * number]
    command = [sys.executable, "-c", "import sys, widekernel_command; sys.exit(widekernel_command.main())"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, *broken.arguments()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 2 and done.stderr.startswith("error: ") and broken.key in done.stderr
    assert not list(tmp_path.iterdir()) and seconds < LIMIT_S
