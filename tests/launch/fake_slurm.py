"""A cluster of one machine: `sbatch`, `srun`, `scontrol`, `scancel` and `squeue` as far as a job needs them.

The commands are links to this file, which keeps the state of the only job in the folder FAKE_SLURM. Like SLURM, it signals
all processes of the tasks, with the children that they have started.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

JOB = "4242"
COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "squeue")


class FakeSlurm:
    """The cluster, as a test sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self) -> Path:
        """Create the commands, and return the folder that holds them."""
        binaries = self.folder / "bin"
        binaries.mkdir(parents=True)
        for name in COMMANDS:
            script = binaries / name
            script.write_text(f"#!{sys.executable} -S\n{Path(__file__).read_text()}")
            script.chmod(0o755)
        return binaries

    def put(self, name: str, text: str) -> None:
        path = self.folder / name
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)

    def get(self, name: str, default: str = "") -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else default

    def note(self, *words: str) -> None:
        with (self.folder / "calls").open("a") as file:
            file.write(shlex.join(words) + "\n")

    @property
    def calls(self) -> list[str]:
        """The calls of scontrol and scancel so far."""
        return self.get("calls").splitlines()

    @property
    def requeues(self) -> int:
        return sum(call.startswith("scontrol requeue") for call in self.calls)

    @property
    def state(self) -> str:
        return self.get("state", "PENDING")

    def tasks(self) -> list[int]:
        """Return the process identifiers of the tasks in the order of their ranks."""
        return json.loads(self.get("tasks", "[]"))

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        """Signal all processes of the tasks, or of some of them."""
        tasks = self.tasks()
        for task in tasks if ranks is None else [tasks[rank] for rank in ranks]:
            for process in [*descendants(task), task]:
                with suppress(ProcessLookupError):
                    os.kill(process, number)

    def wait(self, seconds: float = 60) -> str:
        """Wait until the job is over, and return its state."""
        end = time.monotonic() + seconds
        while self.state in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < end, f"the job is still {self.state}"
            time.sleep(0.02)
        return self.state


def descendants(process: int) -> list[int]:
    """Return the children of a process, and theirs."""
    children = []
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            children += [int(word) for word in thread.read_text().split()]
    return [number for child in children for number in (*descendants(child), child)]


def tasks_of(process: int) -> list[int]:
    """Return the processes of the tasks of a local job, which `process` controls."""
    return sorted(
        number for number in descendants(process) if b"submitit.core" in Path(f"/proc/{number}/cmdline").read_bytes()
    )


def options(script: Path) -> dict[str, str]:
    """Return the parameters in a file for sbatch."""
    lines = [shlex.split(line)[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    return dict(line.removeprefix("--").partition("=")[::2] for line in lines)


def sbatch(slurm: FakeSlurm, script: str) -> int:
    slurm.put("script", str(Path(script).resolve()))
    if os.environ.get("FAKE_SLURM_REFUSES"):
        sys.stderr.write("sbatch: error: invalid partition specified: nowhere\n")
        return 1
    print(f"Submitted batch job {JOB}")
    sys.stdout.flush()
    if not os.environ.get("FAKE_SLURM_HOLDS") and os.fork() == 0:
        os.setsid()
        with (slurm.folder / "daemon").open("ab", buffering=0) as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        try:
            control(slurm)
        finally:
            os._exit(0)
    return 0


def control(slurm: FakeSlurm) -> None:
    """Run the job, again whenever it is requeued."""
    script = Path(slurm.get("script"))
    given = options(script)
    nodes, each = int(given.get("nodes", "1")), int(given.get("ntasks-per-node", "1"))
    names = f"host[1-{nodes}]" if nodes > 1 else "host1"
    variables = {"SLURM_JOB_ID": JOB, "SLURM_NTASKS": str(nodes * each), "SLURM_JOB_NUM_NODES": str(nodes)}
    variables["SLURM_JOB_NODELIST"] = os.environ.get("FAKE_SLURM_NODES", names)
    for restart in range(20):
        slurm.put("state", "RUNNING")
        environment = {**os.environ, **variables, "SLURM_RESTART_COUNT": str(restart)}
        code = subprocess.run(["bash", str(script)], env=environment, check=False).returncode
        slurm.put("tasks", "[]")
        if slurm.state == "COMPLETING":
            slurm.put("state", "CANCELLED")
            return
        if not (slurm.folder / "requeue").exists():
            slurm.put("state", "FAILED" if code else "COMPLETED")
            return
        (slurm.folder / "requeue").unlink()
        slurm.put("state", "PENDING")


def srun(slurm: FakeSlurm, *arguments: str) -> int:
    words, output, kill = list(arguments), "", False
    while words[0].startswith("--"):
        word = words.pop(0)
        if word == "--output":
            output = words.pop(0)
        kill |= word == "--kill-on-bad-exit=1"
    count, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    tasks = []
    for rank in range(count):
        node, local = divmod(rank, count // nodes)
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        with Path(output.replace("%j", JOB).replace("%t", str(rank))).open("ab") as log:
            tasks.append(subprocess.Popen(words, env={**os.environ, **place}, stdout=log, stderr=log))
    slurm.put("tasks", json.dumps([task.pid for task in tasks]))
    while any(task.poll() is None for task in tasks):
        if kill and any(task.returncode for task in tasks):
            slurm.signal(signal.SIGTERM, [rank for rank, task in enumerate(tasks) if task.poll() is None])
        time.sleep(0.02)
    return max(abs(task.returncode) for task in tasks)


def scontrol(slurm: FakeSlurm, verb: str, *arguments: str) -> int:
    slurm.note("scontrol", verb, *arguments)
    if verb == "requeue":
        if slurm.get("requeue fails"):
            sys.stderr.write("slurm_requeue error: Requested operation is presently disabled\n")
            return 1
        slurm.put("requeue", "")
    else:
        print(f"JobId={JOB} JobName=widekernel\n   JobState={slurm.state} Reason=None\n")
        print(f"   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={slurm.get('preempted', 'None')}\n")
    return 0


def scancel(slurm: FakeSlurm, _job: str) -> int:
    slurm.note("scancel")
    slurm.put("state", "COMPLETING")
    slurm.signal(signal.SIGTERM)
    return 0


def squeue(slurm: FakeSlurm, *_: str) -> int:
    if slurm.state in ("PENDING", "RUNNING", "COMPLETING"):
        print(slurm.state)
        return 0
    sys.stderr.write("slurm_load_jobs error: Invalid job id specified\n")
    return 1


if __name__ == "__main__":
    sys.exit(globals()[Path(sys.argv[0]).name](FakeSlurm(Path(os.environ["FAKE_SLURM"])), *sys.argv[1:]))
