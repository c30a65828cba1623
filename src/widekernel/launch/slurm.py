"""Submission of a command to a SLURM cluster through submitit."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import widekernel_command
from widekernel.errors import WidekernelError
from widekernel.launch.slurm_config import SlurmConfig
from widekernel.launch.task import IN_A_TASK


class SubmissionError(WidekernelError, RuntimeError):
    """Error for a job that cannot be submitted."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job that has been submitted.

    Args:
        config: settings of the job
        job: submitit's job
    """

    config: SlurmConfig
    job: Any

    @property
    def number(self) -> str:
        """Identifier of the job: SLURM's, or the process that controls a local job."""
        return str(self.job.job_id)

    @property
    def log(self) -> Path:
        """Log of the first process."""
        return Path(self.job.paths.stdout)

    def describe(self) -> str:
        """Return what was submitted, and the commands that watch and cancel it, one per line."""
        nodes, processes = self.config.nodes, self.config.processes_per_node
        local = self.config.cluster == "local"
        state = f"ps {self.number}" if local else f"squeue --job {self.number}"
        cancel = f"kill {self.number}" if local else f"scancel {self.number}"
        log = shlex.quote(os.path.relpath(self.log))
        return (
            f"Submitted job {self.number}: {nodes} node(s) with {processes} process(es) each, "
            f"for {self.config.minutes / 60:g} hours at a time.\n"
            f"  logs    {shlex.quote(os.path.relpath(self.log.parent))}\n"
            f"  state   {state}\n"
            f"  watch   tail -n +1 -F {log}\n"
            f"  cancel  {cancel}"
        )

    def follow(self, show: Callable[[str], object], seconds: float | None = None) -> bool:
        """Pass the log of the first process to `show` as it grows, until the job is over.

        Args:
            show: receiver of the text.
            seconds: time between two looks; `None` means 0.5 for a local job, and 10 on a cluster.

        Returns:
            whether the run finished.
        """
        pause = seconds if seconds is not None else (0.5 if self.config.cluster == "local" else 10.0)
        position, over = 0, False
        while True:
            if self.log.exists():
                with self.log.open(errors="replace") as file:
                    file.seek(position)
                    text = file.read()
                    position = file.tell()
                if text:
                    show(text)
            if over:
                return bool(self.job.paths.result_pickle.exists())
            over = self._is_over()
            if not over:
                time.sleep(pause)

    def _is_over(self) -> bool:
        if self.config.cluster == "local":
            return bool(self.job.done())
        command = ["squeue", "--noheader", "--job", self.number, "--format", "%T"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return not done.stdout.strip()
        return "invalid job id" in done.stderr.lower()  # other failures, such as a busy controller, pass


def is_in_a_task() -> bool:
    """Return whether this process belongs to a job that `submit` started."""
    return IN_A_TASK in os.environ


def submit(config: SlurmConfig, command: Sequence[str], run_folder: Path) -> SubmittedJob:
    """Submit a job that runs `command` in each of its processes, in the present working directory.

    The job stores the command as text, and so it also starts after an update of the package. Its files and logs are in
    the folder `slurm` of the run folder.

    Args:
        config: settings of the job.
        command: program and arguments, which resume the run if they are repeated.
        run_folder: folder of the run.

    Raises:
        SubmissionError: submitit or SLURM is missing, or SLURM refuses the job.
    """
    submitit = _import_submitit()
    if config.cluster == "slurm":
        missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
        if missing:
            raise SubmissionError(
                f"This machine has no {' and no '.join(missing)}, so no job can be submitted. Repeat the command on a login "
                "node of the cluster, or add --slurm.cluster local to run the job on this machine."
            )
    folder = run_folder.absolute() / "slurm"
    task = {
        "command": [str(argument) for argument in command],
        "directory": str(Path.cwd()),
        "run_folder": str(run_folder.absolute()),
        "max_restarts": config.max_restarts,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        executor = _executor(submitit, config, folder, run_folder)
        with submitit.helpers.clean_env():  # a job that is submitted from within another one inherits nothing of it
            job = executor.submit(widekernel_command.run_task, task)
    except OSError as error:
        raise SubmissionError(f"The job cannot be submitted from {folder}: {error}. Choose another --output.") from error
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise SubmissionError(f"sbatch refused the job: {str(error).strip()}. Change the --slurm settings.") from error
    return SubmittedJob(config, job)


def slurm_parameters(config: SlurmConfig, run_folder: Path) -> dict[str, Any]:
    """Return the parameters of a job for submitit's `AutoExecutor.update_parameters`."""
    return {
        "name": f"widekernel {run_folder.name}",
        "nodes": config.nodes,
        "tasks_per_node": config.processes_per_node,
        "gpus_per_node": config.gpus or None,
        "cpus_per_task": config.cpus_per_gpu,
        "mem_gb": config.memory,
        "timeout_min": config.minutes,
        "stderr_to_stdout": True,
        "slurm_partition": config.partition,
        "slurm_account": config.account,
        "slurm_qos": config.qos,
        "slurm_constraint": config.constraint,
        "slurm_comment": config.comment,
        "slurm_signal_delay_s": config.signal_seconds,
        "slurm_setup": list(config.setup) or None,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],  # if one process crashes, the others cannot go on
        "slurm_additional_parameters": {"requeue": True, **config.sbatch},
    }


def _executor(submitit: Any, config: SlurmConfig, folder: Path, run_folder: Path) -> Any:
    if config.cluster == "slurm":
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
        executor.update_parameters(**slurm_parameters(config, run_folder))
        return executor
    executor = submitit.LocalExecutor(folder=folder)  # AutoExecutor does not pass it the time of the signal
    executor.update_parameters(
        tasks_per_node=config.processes_per_node,
        gpus_per_node=config.gpus,
        timeout_min=config.minutes,
        signal_delay_s=config.signal_seconds,
        stderr_to_stdout=True,
    )
    return executor


def _import_submitit() -> Any:
    try:
        import submitit
        import submitit.core.utils
        import submitit.helpers
    except ImportError as error:
        raise SubmissionError(
            f"Jobs are submitted by submitit, which cannot be imported ({error}). "
            "Install it with `pip install 'widekernel[slurm]'`."
        ) from error
    return submitit
