"""Several processes on one machine: environment, output, signals, exit codes; nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from widekernel.errors import ConfigError
from widekernel.launch import local

# Starts in milliseconds: without the package, which imports PyTorch.
LAUNCHER = """
import importlib.util, signal, sys, types
for number in (signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)  # a shell or nohup may ignore them
widekernel = types.ModuleType("widekernel"); widekernel.__path__ = [sys.argv[1] + "/widekernel"]
sys.modules["widekernel"] = widekernel
from widekernel.launch.local import launch
say = lambda line: sys.stderr.write(line + "\\n")  # at once, also if unbuffered: process 0 writes to the same place
sys.exit(launch([sys.executable, "-S", "-c", sys.argv[3]], int(sys.argv[2]), say))
"""
SOURCE = str(Path(local.__file__).parents[2])
HANDLING = """
import os, signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(number))
open("ready." + os.environ["RANK"], "w").close()
end = time.time() + 20
while not got and time.time() < end: time.sleep(0.02)
time.sleep(0.5)
sys.stderr.write(f"process {os.environ['RANK']} got {got}\\n")
sys.exit(128 + got[0])
"""


def start(processes: int, program: str, folder: Path, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-S", "-c", LAUNCHER, str(SOURCE), str(processes), program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if "packages" in path)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def await_files(folder: Path, names: list[str]) -> None:
    deadline = time.time() + 20
    while not all((folder / name).exists() for name in names):
        assert time.time() < deadline
        time.sleep(0.02)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_environment() -> None:
    first, second = local.environments(2, {"HOME": "/h", "OMP_NUM_THREADS": "7", "RANK": "5"})
    assert first["OMP_NUM_THREADS"] == "7" and first["HOME"] == "/h"
    assert [first["RANK"], second["RANK"]] == ["0", "1"] == [first["LOCAL_RANK"], second["LOCAL_RANK"]]
    assert second["WORLD_SIZE"] == second["LOCAL_WORLD_SIZE"] == "2"
    assert first["MASTER_ADDR"] == "127.0.0.1" and first["MASTER_PORT"] == second["MASTER_PORT"]
    cores = len(os.sched_getaffinity(0))
    assert local.environments(2, {})[0]["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    with pytest.raises(ConfigError, match="0, but must be 1"):
        local.launch(["true"], 0, print)


def test_output(tmp_path: Path) -> None:
    program = "import os, sys; r = os.environ['RANK']; print('out', r); sys.stderr.write(f'same\\nerror {r}\\n')"
    launcher = start(3, program, tmp_path)
    out, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 0
    assert out == "out 0\n"
    lines = sorted(errors.splitlines())
    assert [line for line in lines if "error" in line] == ["[rank 1] error 1", "[rank 2] error 2", "error 0"]
    assert sum(line in ("[rank 1] same", "[rank 2] same") for line in lines) == 1


def test_lines_do_not_run_into_one_another() -> None:
    """What receives the lines need not expect two at once: `print` writes a line and its end one after the other."""
    program = "import os, sys; r = os.environ['RANK']; [sys.stderr.write(f'{n} of {r}\\n') for n in range(40)]"
    inside, together, lines = [], [], []

    def say(line: str) -> None:
        inside.append(line)
        time.sleep(0.002)
        together.append(len(inside))
        inside.remove(line)
        lines.append(line)

    assert local.launch([sys.executable, "-S", "-c", program], 4, say) == 0
    assert set(together) == {1}
    assert sorted(lines) == sorted(f"[rank {rank}] {n} of {rank}" for rank in range(1, 4) for n in range(40))


@pytest.mark.parametrize(
    ("fate", "code", "text"),
    [
        ("os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL"),
        ("sys.exit(3)", 3, "ended with exit code 3"),
    ],
)
def test_a_process_dies(
    tmp_path: Path, fate: str, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(local, "NOTICE_S", 0.2)
    monkeypatch.setattr(local, "GRACE_S", 0.4)
    program = (
        f"import os, signal, sys, time; r = os.environ['RANK']; open('{tmp_path}/' + r, 'w').write(str(os.getpid()))\n"
        "if r == '2': signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open('{tmp_path}/ready.' + r, 'w').close()\n"
        f"while not all(os.path.exists('{tmp_path}/ready.' + other) for other in '012'): time.sleep(0.01)\n"
        f"if r == '1': {fate}\n"
        "time.sleep(60)"
    )
    lines: list[str] = []
    before = time.monotonic()
    assert local.launch([sys.executable, "-S", "-c", program], 3, lines.append) == code
    assert time.monotonic() - before < 10
    pids = {rank: int((tmp_path / str(rank)).read_text()) for rank in range(3)}
    assert lines[0].startswith(f"Process 1 (rank 1, pid {pids[1]}) {text}")
    assert lines[-1] == f"Process 2 (rank 2, pid {pids[2]}) did not end within 0 s, and was killed."
    assert not any(exists(pid) for pid in pids.values())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a process is stopped")
@pytest.mark.parametrize("code", [0, 3])
def test_a_stopped_process_keeps_nobody_waiting(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not react to SIGTERM, so it is also continued."""
    monkeypatch.setattr(local, "STOPPED_S", 0.1)
    program = (
        "import os, signal, sys, time\n"
        "def leave(*_): sys.stderr.write('saved\\n'); sys.exit(143)\n"
        f"if os.environ['RANK'] == '0': sys.exit({code})\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
        "time.sleep(60)"
    )
    lines: list[str] = []
    before = time.monotonic()
    assert local.launch([sys.executable, "-S", "-c", program], 2, lines.append) == (code or 143)
    assert time.monotonic() - before < local.NOTICE_S
    assert "[rank 1] saved" in lines


def test_signals_are_passed_on_once(tmp_path: Path) -> None:
    """As for one process, the exit code says which signal arrived; Ctrl-C in a terminal goes to the whole group."""
    cases = [(signal.SIGINT, os.killpg), (signal.SIGINT, os.kill), (signal.SIGTERM, os.killpg), (signal.SIGTERM, os.kill)]
    cases += [(signal.SIGHUP, os.kill), (signal.SIGUSR1, os.kill)]
    launchers = []
    for place, _ in enumerate(cases):
        folder = tmp_path / str(place)
        folder.mkdir()
        launchers.append(start(2, HANDLING, folder, start_new_session=True))
    for place, (launcher, (number, send)) in enumerate(zip(launchers, cases)):
        await_files(tmp_path / str(place), ["ready.0", "ready.1"])
        send(launcher.pid, number)
    for launcher, (number, _) in zip(launchers, cases):
        _, errors = launcher.communicate(timeout=30)
        assert launcher.returncode == 128 + number
        assert sorted(errors.splitlines()) == [f"[rank 1] process 1 got [{int(number)}]", f"process 0 got [{int(number)}]"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_no_process_outlives_the_launcher(tmp_path: Path) -> None:
    program = "import os, time; open('ready.' + os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(60)"
    launcher = start(2, program, tmp_path)
    await_files(tmp_path, ["ready.0", "ready.1"])
    time.sleep(0.1)
    pids = [int((tmp_path / f"ready.{rank}").read_text()) for rank in range(2)]
    launcher.kill()
    launcher.wait()
    deadline = time.time() + 5
    while any(map(exists, pids)) and time.time() < deadline:
        time.sleep(0.02)
    assert not any(map(exists, pids))
    for stream in (launcher.stdout, launcher.stderr):
        stream.close()
