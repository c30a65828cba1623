"""The command `widekernel train`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import jsonargparse
import yaml

from widekernel.cli.console import ConsoleReporter, result_console
from widekernel.cli.launching import check_number, is_first, is_started, start
from widekernel.cli.parsing import build, new_parser, parse, parse_given, read_settings, typed
from widekernel.cli.progress_text import metric_texts
from widekernel.cli.task_choice import chosen_task
from widekernel.data.batch_plan import BatchPlan
from widekernel.engine.interrupts import Interrupted
from widekernel.engine.run_folder import RunFolder
from widekernel.errors import ConfigError
from widekernel.launch.slurm import is_in_a_task, submit
from widekernel.launch.slurm_config import SlurmConfig
from widekernel.recipes import load_recipe
from widekernel.settings import require
from widekernel.tasks.config import FIRST_TASK, TASK, RunConfig
from widekernel.tasks.registry import TASKS, task_entry

if TYPE_CHECKING:
    from widekernel.tasks.results import RunResult

_DESCRIPTION = (
    "Train {trained}. Settings come from the recipe, the configuration files and the command line; later ones override "
    "earlier ones. Repeating the command resumes the run, or reports its result if it is finished."
)


def run(arguments: list[str]) -> int:
    """Train as `arguments` say, and print the result; with `--print_config`, only print the settings."""
    task = chosen_task(arguments)
    given = parse_given(make_parser(task), arguments)
    if given.get("print_config"):
        sys.stdout.write(yaml.safe_dump(parse_config(arguments).to_dict(), sort_keys=False))
        return 0
    config = parse_config(arguments)
    job = None if is_in_a_task() else parse_slurm(arguments)
    processes = given.get("processes")
    if job is not None and processes is not None:
        raise ConfigError(
            f"--processes is {processes}, but a cluster job starts its processes itself, slurm.gpus or slurm.processes on "
            "each node: leave --processes out."
        )
    if job is not None:
        return submit_training(job, arguments, config)
    if processes is not None and not is_started(processes):
        require(processes > 0, "--processes", processes, "1 or more")
        BatchPlan(config.loop.batch_size, config.loop.micro_batch, processes)
        check_number(processes)
        return start("train", arguments, processes)
    train = task_entry(task).train_function()
    talks = is_first()
    with ConsoleReporter() as reporter:
        try:
            result = train(config, reporter)
        except Interrupted as interruption:
            name = signal.Signals(interruption.signal_number).name
            if talks:
                reporter.message(f"Stopped by {name}; the state is saved. The same command resumes the run.")
            raise
    if talks:
        print_result(result)
    return 0


def make_parser(task: str = FIRST_TASK) -> jsonargparse.ArgumentParser:
    """Return the parser of all settings of the training for a task."""
    entry = task_entry(task)
    parser = new_parser("train", _DESCRIPTION.format(trained=entry.trained))
    parser.add_argument(
        f"--{TASK}",
        type=str | None,
        default=None,
        help=f"what is learned: {', '.join(TASKS)}; the default is the task of the recipe or file, or {FIRST_TASK}. Each "
        "task has its own settings, which --task TASK --help lists",
    )
    parser.add_argument("--recipe", type=str | None, default=None, help="name of a recipe; `widekernel recipes` lists them")
    parser.add_argument("--config", action="append", help="YAML file with settings; may be repeated")
    parser.add_argument("--print_config", action="store_true", help="print the settings as YAML, and exit")
    parser.add_argument(
        "--processes",
        type=int | None,
        default=None,
        help="processes on this machine that train together; on GPUs, one for each",
    )
    parser.add_class_arguments(entry.settings_class(), as_group=False)
    parser.add_class_arguments(SlurmConfig, "slurm")
    return parser


def parse_config(arguments: list[str]) -> RunConfig:
    """Return the training configuration that `arguments` describe.

    Its class is that of the task. The recipe comes first, then the files in their order, then the command line; later ones
    override earlier ones.

    Raises:
        ConfigError: a setting, recipe or file is unknown, unreadable, of the wrong type or out of range.
    """
    task = chosen_task(arguments)
    parser = make_parser(task)
    given = parse_given(parser, arguments)
    files = [read_settings(path, parser) for path in given.get("config") or []]
    named = [settings.get("recipe") for settings in (*files, given)]
    recipe = next((name for name in reversed(named) if name is not None), None)
    layers = files if recipe is None else [load_recipe(recipe).settings_for("train"), *files]
    values = parse(parser, arguments, layers)
    for key in (TASK, "recipe", "config", "print_config", "processes", "slurm"):
        del values[key]
    for network in (values["model"], *([values["distillation"]["teacher"]] if "distillation" in values else [])):
        network["args"] = typed(network["args"])
    if values["output"] is None:
        values["output"] = str(Path("runs") / str(recipe or values["model"]["name"]))
    return build(task_entry(task).settings_class(), values)


def parse_slurm(arguments: list[str]) -> SlurmConfig | None:
    """Return the settings of the job that `arguments` and their files ask for; `None` if they hold no `slurm` settings.

    Raises:
        ConfigError: a setting is unknown, unreadable, of the wrong type or out of range.
    """
    parser = make_parser(chosen_task(arguments))
    given = parse_given(parser, arguments)
    files = [read_settings(path, parser) for path in given.get("config") or []]
    if not any("slurm" in settings for settings in (*files, given)):
        return None
    return build(SlurmConfig, parse(parser, arguments, files)["slurm"], "slurm")


def submit_training(job: SlurmConfig, arguments: list[str], config: RunConfig) -> int:
    """Submit the training with the settings `config`, which `arguments` describe, as a cluster job.

    Returns:
        the exit code: 0 if the job was submitted, or, if it is followed, if the run finished; else 1.

    Raises:
        RunFolderError: the folder belongs to another run.
        SubmissionError: the job cannot be submitted.
    """
    folder = RunFolder(config.output or "runs")
    folder.prepare(config.to_dict())
    if folder.read_summary() is not None:
        result_console().print(f"The run in {folder.path} is already finished; no job was submitted.", soft_wrap=True)
        return 0
    submitted = submit(job, [sys.executable, "-m", "widekernel", "train", *arguments], folder.path)
    sys.stdout.write(submitted.describe() + "\n")
    sys.stdout.flush()
    if not job.follow:
        return 0
    finished = submitted.follow(lambda text: (sys.stdout.write(text), sys.stdout.flush()))
    return 0 if finished else 1


def print_result(result: RunResult) -> None:
    """Print the result of a run."""
    summary, console = result.summary, result_console()
    state = "was already finished" if result.was_finished else "is finished"
    if result.other_code:
        state = f"was finished {result.other_code}"
    length = f"{summary['epochs']} epochs, {summary['step']} steps"
    console.print(f"The run in {result.folder.path} {state} ({length}).", soft_wrap=True)
    if result.other_code:
        advice = "`widekernel eval` evaluates its model with the present code; another --output starts a new run."
        console.print(advice, soft_wrap=True)
    texts = metric_texts(result.metrics, summary)
    for kind, text in texts.items():
        console.print(f"  {kind:<16}  {text}", soft_wrap=True)
    if not texts:
        console.print("  nothing was evaluated: there are no held-out images (data.val_split is null)")
    evaluated = [value for key, value in summary.items() if key.endswith("val_unreadable")]
    skipped = summary["train_unreadable"], max(evaluated, default=0)
    if any(skipped):
        console.print(f"  unreadable images: {skipped[0]} in training, {skipped[1]} held out")
    console.print(f"  model             {result.folder.model}", soft_wrap=True)
