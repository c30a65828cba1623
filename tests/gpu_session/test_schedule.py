"""Stages of a GPU session: their time, how they end, and what they leave behind. The stages here are tiny programs."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks.gpu_session import record as recording
from benchmarks.gpu_session.record import Record
from benchmarks.gpu_session.schedule import DONE, FAILED, NOT_RUN, OUT_OF_TIME, Result, Schedule, Stage, budget

PLAIN = [sys.executable, "-S", "-E", "-c"]
FOR_EVER = "import time; time.sleep(600)"


def stage(name: str, program: str, share: float = 1.0, **more) -> Stage:
    return Stage(name, lambda seconds: [*PLAIN, program], share, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def record(folder: Path) -> Record:
    return Record(folder, {"minutes": 1}, io.StringIO())


def run(stages: Sequence[Stage], seconds: float, record: Record) -> dict[str, Result]:
    results = Schedule(stages, seconds, record, os.environ).run()
    record.finish(results)
    return {result.stage: result for result in results}


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_unused_time_goes_to_later_stages() -> None:
    stages = [stage("a", "", 1), stage("b", "", 2), stage("c", "", 1)]
    assert budget(stages, 80) == 20 and budget(stages[1:], 75) == 50 and budget(stages[2:], 25) == 25
    assert budget([stage("a", "", 3, most=30), stages[0]], 100) == 30, "no more than it can use"
    assert budget(stages, -5) == 0


@pytest.mark.parametrize("shrunk", [1.0, 0.01])
def test_budgets_shrink_with_the_time(shrunk: float) -> None:
    from benchmarks.gpu_session.stages import stages

    real = stages(Path("out"), Path("facts"), rehearsal=False)
    left, given = 534 * shrunk, []
    for number, each in enumerate(real):
        given.append(min(budget(real[number:], left), 30 * shrunk if each.name == "ready" else 1e9))
        left -= given[-1]
    assert left == pytest.approx(0) and [each.name for each in real][1:] == [
        "correctness",
        "operators",
        "tuning",
        "networks",
    ]
    check, operators, tuning, networks = (seconds / shrunk / 60 for seconds in given[1:])
    assert 1 <= check <= 2 and 2 <= operators <= 3 and 2 <= tuning <= 3 and networks > 1


def test_failures_do_not_stop_later_stages(record: Record, folder: Path) -> None:
    stages = [
        stage("good", "print('all well')"),
        stage("bad", "import sys; print('error: it broke'); print('more'); sys.exit(3)"),
        Stage("absent", lambda seconds: ["/nonexistent/program"], 1.0),
        stage("killed", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        stage("pointless", "print('not to be seen')", needs=("bad",)),
        stage("late", "", least=1e6),
        stage("last", "print('the end')"),
    ]
    results = run(stages, 60, record)
    states = [result.state for result in results.values()]
    assert states == [DONE, FAILED, FAILED, FAILED, NOT_RUN, NOT_RUN, DONE]
    assert (results["bad"].exit, results["bad"].reason) == (3, "exit code 3: error: it broke")
    assert "FileNotFoundError" in results["absent"].reason and results["killed"].reason == "signal 11"
    assert results["pointless"].reason == "bad did not succeed: exit code 3: error: it broke"
    assert "needs at least 1000000" in results["late"].reason
    log = (folder / "session.log").read_text()
    assert "all well" in log and "the end" in log and "not to be seen" not in log
    content = summary(folder)
    assert content["ended"] and [each["state"] for each in content["stages"]] == states


@pytest.mark.slow
def test_a_deadline_ends_a_stage_and_its_processes(record: Record, tmp_path: Path, folder: Path) -> None:
    child, csv = tmp_path / "child", folder / "ops.csv"
    program = f"""
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
open({str(csv)!r}, "w").write("one row\\n")
open({str(child)!r}, "w").write(str(child.pid))
{FOR_EVER}
"""
    # The first ignores the request to end; its share determines its deadline.
    started = time.monotonic()
    results = run([stage("hangs", program, 1, most=2.0), stage("next", "print('my turn')")], 60, record)
    assert results["hangs"].state == OUT_OF_TIME and results["next"].state == DONE
    assert time.monotonic() - started < 30
    assert csv.read_text() == "one row\n", "what was written counts"
    assert not _lives(int(child.read_text()))


def _lives(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().split(") ")[1][0] not in "ZX"
    except (OSError, IndexError):
        return False


def test_processes_left_running_are_ended(record: Record, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", {FOR_EVER!r}])
open({str(pid)!r}, "w").write(str(child.pid))
"""
    kept: list[int] = []
    watching = Stage("watch", lambda seconds: kept.append(int(pid.read_text())) or [*PLAIN, ""], 1.0)
    started = time.monotonic()
    results = run([stage("leaves", program), watching], 60, record)
    assert [result.state for result in results.values()] == [DONE, DONE]
    assert time.monotonic() - started < 30 and not _lives(kept[0])


def test_an_interrupt_is_recorded(record: Record, folder: Path) -> None:
    def interrupted(seconds: float) -> Sequence[str]:
        raise KeyboardInterrupt

    schedule = Schedule([stage("a", ""), Stage("b", interrupted, 1.0), stage("c", "")], 60, record, os.environ)
    with pytest.raises(KeyboardInterrupt):
        schedule.run()
    record.finish(schedule.results)
    assert [each["state"] for each in summary(folder)["stages"]] == [DONE, "interrupted", NOT_RUN]


def test_at_most_eight_small_files(record: Record, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(recording, "LARGEST", 1000)
    monkeypatch.setattr(recording, "LONGEST_LOG", 500)
    names = [*recording.FILES[2:], "tuned.json.123.456", "core", ".ops.csv.new"]
    program = f"""
import os
for name in {names!r}:
    open(os.path.join({str(folder)!r}, name), "w").write("x" * 3000)
print("y" * 5000)
"""
    assert run([stage("a", program)], 60, record)["a"].state == DONE
    there = sorted(path.name for path in folder.iterdir())
    assert there == sorted(recording.FILES) and len(there) == 8
    assert max(path.stat().st_size for path in folder.iterdir() if path.name not in recording.FILES[:2]) <= 1000
    log = (folder / "session.log").read_text()
    assert len(log) < 3000 and "The log is full" in log and "took  exit  reason" in log, "the end is there in any case"
    assert all(part.isalnum() or part in "._-" for name in recording.FILES for part in name)


def test_summary_is_always_up_to_date(record: Record, folder: Path) -> None:
    def look(seconds: float) -> Sequence[str]:
        program = f"import json; print([s['state'] for s in json.load(open({str(folder / 'summary.json')!r}))['stages']])"
        return [*PLAIN, program]

    run([stage("a", ""), Stage("b", look, 1.0), stage("c", "")], 60, record)
    assert "['done', 'running', 'not run']" in (folder / "session.log").read_text()


def test_commands_stop_before_their_deadline() -> None:
    from benchmarks.gpu_session.stages import stages

    for rehearsal in (False, True):
        real = {each.name: each for each in stages(Path("/out"), Path("/facts"), rehearsal)}
        for name in ("operators", "tuning", "networks"):
            command = list(real[name].command(120.0))
            assert 60 * float(command[command.index("--minutes") + 1]) == pytest.approx(90, abs=1)
        command = list(real["correctness"].command(120.0))
        assert 100 < float(command[command.index("--until") + 1]) - time.time() <= 120
        assert all(each.needs == ("ready",) for name, each in real.items() if name != "ready")
    assert {"replknet_31b", "slak_tiny"} <= set(stages(Path("/out"), Path("/facts"), False)[3].command(60.0))
