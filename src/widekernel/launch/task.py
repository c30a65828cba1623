"""One process of a cluster job: runs the command as a child, forwards signals to it, and requeues the job.

SLURM signals every process of a job. This one stays alive until its child has saved its state and ended, so the state is
complete when the job is requeued. It imports neither PyTorch nor networks, so it reacts from the first second on.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from widekernel.engine.process_environment import RUN_ID
from widekernel.launch.restarts import Starts, claim_restart, may_restart, note_start, read_starts

IN_A_TASK = "WIDEKERNEL_SLURM_TASK"
"""Variable of the environment that tells a command that it runs in a job, and so must not submit itself again."""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOCAL_STARTS = 6
"""Times that submitit's local executor starts a job."""

_LOCAL_RESTART = 144  # exit code that makes submitit's local executor start the job again
_EXPECTED_ERROR = 2
_FIRST_PORT, _PORTS = 15000, 16000  # below the ports that systems hand out on their own


def _signals(*names: str) -> frozenset[int]:
    """Return the numbers of those of the signals that the system has."""
    return frozenset(int(getattr(signal, name)) for name in names if hasattr(signal, name))


_PREEMPTION = _signals("SIGUSR1", "SIGUSR2")
_STOP = _PREEMPTION | _signals("SIGINT", "SIGTERM", "SIGHUP")

log = logging.getLogger("submitit")  # submitit writes it to the log of the process


class Outcome(enum.Enum):
    """How the child of a task ended."""

    FINISHED = "has finished"
    PREEMPTED = "was stopped by a signal of the scheduler"
    STOPPED = "was stopped on request"
    REFUSED = "was stopped by an error that a restart would repeat"
    CRASHED = "has crashed"


def run_task(task: Mapping[str, Any]) -> None:
    """Run one process of a job, restart the job if it should go on, and exit with the code of the child.

    Args:
        task: plain values: `command` with its arguments, working `directory`, `run_folder` and `max_restarts`.

    Raises:
        SystemExit: the child did not finish; the code is the child's, or 128 + n if signal n killed it.
    """
    import submitit

    environment, run_folder = submitit.JobEnvironment(), Path(task["run_folder"])
    child = Child()
    child.catch_signals()
    if environment.global_rank == 0:
        note_start(run_folder, environment.job_id)
    code = child.run(task["command"], task["directory"], torchrun_variables(environment))
    result = outcome(code, child.received)
    log.info("Process %d of %d %s (exit code %d).", environment.global_rank, environment.num_tasks, result.value, code)
    if result is Outcome.FINISHED:
        return
    job = Job(environment, run_folder, task["max_restarts"])
    if job.goes_on(result, child.received):
        job.restart()
    elif result is Outcome.PREEMPTED and environment.global_rank != 0:
        sys.exit(0)  # process 0 requeues; an error code might make the cluster kill it before it has saved
    sys.exit(128 - code if code < 0 else code)


def outcome(code: int, received: Collection[int]) -> Outcome:
    """Return how a child ended, from its exit code (negative if a signal killed it) and the signals that arrived."""
    number = code - 128 if code > 128 else -code
    if code == 0:
        return Outcome.FINISHED
    preempted = number in _PREEMPTION or not _PREEMPTION.isdisjoint(received)
    if number in _STOP:
        return Outcome.PREEMPTED if preempted else Outcome.STOPPED
    if code == _EXPECTED_ERROR:
        return Outcome.REFUSED
    # A process that is told to stop may also fail because another one has already left.
    return Outcome.STOPPED if received and not preempted else Outcome.CRASHED


def torchrun_variables(environment: Any) -> dict[str, str]:
    """Return the environment of the child: that of this process, with torchrun's variables if the job has several processes.

    Args:
        environment: submitit's description of the job.
    """
    variables = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    variables[IN_A_TASK] = "1"
    processes, nodes = environment.num_tasks, environment.num_nodes
    if processes > 1:
        variables.update(
            RANK=str(environment.global_rank),
            WORLD_SIZE=str(processes),
            LOCAL_RANK=str(environment.local_rank),
            LOCAL_WORLD_SIZE=str(processes // nodes),
            MASTER_ADDR=environment.hostnames[0] if nodes > 1 else "127.0.0.1",
            **{RUN_ID: str(environment.job_id)},
            MASTER_PORT=str(_FIRST_PORT + int(environment.job_id) % _PORTS),
        )
    return variables


class Child:
    """A child process to which signals are forwarded.

    Attributes:
        received: the numbers of the signals that have arrived.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def catch_signals(self) -> None:
        """Forward, from now on and for good, the signals that ask to stop; this process must outlive them to requeue.

        Submitit's own handler, which this replaces, would requeue the job before the state is saved.
        """
        for number in _STOP:
            signal.signal(number, self._forward)

    def run(self, command: list[str], directory: str, variables: Mapping[str, str]) -> int:
        """Run a command, and return its exit code: -n if signal n killed it. It gets SIGTERM if this process is killed.

        Args:
            command: the command and its arguments.
            directory: working directory.
            variables: its environment.
        """
        sys.stdout.flush()
        self._process = subprocess.Popen(command, cwd=directory, env=variables, preexec_fn=_end_with_parent())
        for number in tuple(self.received):  # those that arrived before there was a process to send them to
            self._send(number)
        return self._process.wait()

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.received.add(number)
        self._send(number)

    def _send(self, number: int) -> None:
        if self._process is not None:
            # A terminal interrupts the child as well, which takes a second SIGINT for a request to stop without saving.
            self._process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)


class Job:
    """The job that this process belongs to, seen from a process whose child did not finish.

    Args:
        environment: submitit's description of the job
        run_folder: folder of the run
        max_restarts: restarts in a row without a new training state after which the job is given up
    """

    def __init__(self, environment: Any, run_folder: Path, max_restarts: int) -> None:
        self.environment, self.run_folder, self.max_restarts = environment, run_folder, max_restarts
        self.local = environment.cluster == "local"

    def goes_on(self, result: Outcome, received: Collection[int]) -> bool:
        """Return whether this process should restart the job: not if it was canceled, or if process 0 decides.

        Process 0 decides, unless a process crashed; then whoever crashed first does.
        """
        if result is Outcome.REFUSED or (self.environment.global_rank != 0 and result is not Outcome.CRASHED):
            return False
        if self.local:
            return result is not Outcome.STOPPED
        fields = self._fields()
        if fields.get("JobState", "RUNNING") != "RUNNING":
            log.info("The job is not requeued, because its state is %s.", fields["JobState"])
            return False
        # SLURM also announces a preemption by SIGTERM, and records it; `scancel` sends the same signal.
        announced = fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")
        return result is not Outcome.STOPPED or (signal.SIGTERM in received and announced)

    def restart(self) -> None:
        """Ask for a restart of the job, once per start, unless it makes no progress.

        Raises:
            SystemExit: submitit's local executor restarts the job on this exit code.
        """
        record = read_starts(self.run_folder, self.environment.job_id)
        if record is None:
            log.error("The job is not restarted: %s/slurm/restarts.json has no record of it.", self.run_folder)
        elif not may_restart(self.run_folder, record, self.max_restarts):
            log.error(
                "The job is given up: its last %d starts saved no new training state (slurm.max_restarts is %d). "
                "Read the errors above; the same command resumes the run.",
                record.without_progress + 1,
                self.max_restarts,
            )
        elif claim_restart(self.run_folder, record):
            self._start_again(record)

    def _start_again(self, record: Starts) -> None:
        if not self.local:
            _try_scontrol("requeue", self.environment.job_id)
        elif record.starts < LOCAL_STARTS:
            log.info("The job starts again.")
            sys.exit(_LOCAL_RESTART)
        else:
            log.error(
                "The job is not restarted: submitit's local executor starts a job at most %d times. "
                "The same command resumes the run.",
                LOCAL_STARTS,
            )

    def _fields(self) -> dict[str, str]:
        """Return what SLURM knows of the job; nothing if it does not answer."""
        return dict(re.findall(r"(\w+)=(\S+)", _try_scontrol("show", "job", self.environment.job_id) or ""))


def _try_scontrol(*arguments: str) -> str | None:
    """Run `scontrol`, and return its output; if it fails, log the reason and return `None`."""
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        log.error("`scontrol %s` failed: %s. The same command resumes the run.", " ".join(arguments), reason)
        return None
    log.info("`scontrol %s` succeeded.", " ".join(arguments))
    return done.stdout


def _end_with_parent() -> Callable[[], object] | None:
    """Return what a new child does so that it gets SIGTERM when its parent dies; `None` where the system cannot do this."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_parent_death_signal, int(signal.SIGTERM))
