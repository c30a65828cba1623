"""Check every compiled kernel against float64, in several processes, because compiling takes nearly all of the time.

    python3 -m benchmarks.gpu_session.correctness --csv FILE [--until SECONDS] [--workers 12] [--small]

Every row is written at once. A job that hangs, or that makes its process lose the GPU, affects no other job: its process is
replaced. Heavy imports are delayed until the processes have been started, because all of them import the same modules.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from benchmarks.gpu_session.problems import Job

LONGEST_JOB = 60.0
"""Seconds after which a job is considered to hang."""
MOST_WORKERS = 12
ENDS = "ends"
"""Key in the answer of a process that tells whether it accepts no more jobs."""


def all_jobs(small: bool) -> list[Job]:
    """Return the jobs for this machine, which are the same in every process."""
    import torch
    from benchmarks.gpu_session.problems import jobs

    from widekernel.ops.gpu import machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return jobs(device, machine.chip(), machine.device_name(), small)


def work(small: bool) -> int:
    """Read the numbers of jobs, one per line, run them and print their rows; end when the device accepts no more calls."""
    todo = all_jobs(small)
    import torch
    from benchmarks.gpu_session.check import run

    from widekernel.ops.gpu import machine

    device = torch.device(todo[0].problem.device)
    for line in sys.stdin:
        row = run(todo[int(line)], device, machine.chip())
        healthy = _is_healthy(device)
        sys.stdout.write(json.dumps(row | {ENDS: not healthy}) + "\n")
        sys.stdout.flush()
        if not healthy:
            return 1
    return 0


def _is_healthy(device: torch.device) -> bool:
    """Return whether the device accepts more calls: after a fault in a kernel, the process can no longer use it."""
    import torch

    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Worker:
    """A process that runs jobs and is replaced whenever it has ended."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command, self._process = list(command), None
        self._answers: queue.Queue[str] = queue.Queue()
        self._running()

    def ask(self, number: int, seconds: float) -> dict[str, Any] | str:
        """Return the row of a job, or the reason why there is none."""
        try:
            process = self._running()
            assert process.stdin is not None
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.end()
            return f"no answer within {seconds:.0f} s"
        except OSError as error:
            self.end()
            return f"its process could not be run ({error})"
        if not answer:
            code = self._process.wait() if self._process else None
            self.end()
            return f"its process ended with code {code}"
        row = json.loads(answer)
        if row.pop(ENDS, False):
            self.end()  # the next job gets a new process
        return row

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            with suppress(OSError):
                self._process.kill()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen(self._command, **pipes)
            self._answers = queue.Queue()
            threading.Thread(target=_listen, args=(self._process, self._answers), daemon=True).start()
        return self._process


def _listen(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    for line in process.stdout or ():
        answers.put(line)
    answers.put("")


class Run:
    """Distributes jobs to workers and writes their rows to a file."""

    def __init__(self, todo: Sequence[Job], target: Path, seconds: float) -> None:
        from benchmarks.gpu_session.check import COLUMNS

        self.todo, self.verdicts = todo, Counter()
        self.wrong: list[str] = []
        self._deadline = time.monotonic() + seconds
        self._waiting = iter(range(len(todo)))
        self._lock = threading.Lock()
        self._file = target.open("w", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._writer.writeheader()

    def all(self, workers: Sequence[Worker]) -> None:
        """Run jobs until none is left or the time is over."""
        threads = [threading.Thread(target=self._deal, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._file.close()

    def _deal(self, worker: Worker) -> None:
        from benchmarks.gpu_session.check import row_of

        while (left := self._deadline - time.monotonic()) > 0:
            with self._lock:
                number = next(self._waiting, None)
            if number is None:
                break
            answer = worker.ask(number, min(left, LONGEST_JOB))
            if isinstance(answer, str):
                if time.monotonic() >= self._deadline:
                    break  # the job had less time than it may take
                answer = row_of(self.todo[number]) | {"verdict": f"FAILED: {answer}"}
            self._note(answer)
        worker.end()

    def _note(self, row: dict[str, Any]) -> None:
        verdict = row["verdict"].partition(":")[0]
        with self._lock:
            self.verdicts[verdict] += 1
            self._writer.writerow(row)
            self._file.flush()
            if verdict != "right":
                named = (row[key] for key in ("layer", "dtype", "pass", "config", "verdict"))
                self.wrong.append(", ".join(named))
                print(self.wrong[-1], flush=True)


def main(
    arguments: Sequence[str], program: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu_session.correctness")
) -> int:
    """Run all jobs, or those that the parent process requests; `program` starts this program again."""
    parser = argparse.ArgumentParser(prog="correctness")
    parser.add_argument("--csv", type=Path)
    until = "when to stop, in seconds since 1970, because imports take time, too"
    parser.add_argument("--until", type=float, default=time.time() + 90, help=until)
    parser.add_argument("--workers", type=int, default=max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 1)))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--work", action="store_true", help="run the jobs whose numbers arrive on standard input")
    options = parser.parse_args(arguments)
    if options.work:
        return work(options.small)
    command = [*program, "--work", *(["--small"] if options.small else [])]
    workers = [Worker(command) for _ in range(options.workers)]
    todo = all_jobs(options.small)
    running = Run(todo, options.csv, options.until - time.time())
    running.all(workers)
    count, left = running.verdicts.total(), len(todo) - running.verdicts.total()
    print(f"{running.verdicts['right']} of {count} right; {left} of {len(todo)} not checked for lack of time")
    if running.wrong:
        print(f"error: {len(running.wrong)} wrong or failed, the first: {running.wrong[0]}")
        return 1
    if not count:
        print("error: nothing was checked")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
