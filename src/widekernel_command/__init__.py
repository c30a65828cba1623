"""Entry point of the command `widekernel`, outside the package so that `--help` imports neither PyTorch nor networks.

`import widekernel` registers the networks with timm, unless this module was imported first: then the commands register them.
"""


def main() -> int:
    """Run the command line, and return its exit code."""
    from widekernel.cli.main import main as run

    return run()


def run_task(task: dict) -> None:
    """Run one process of a cluster job; `widekernel.launch.task` describes `task`. Submitted jobs name this function."""
    from widekernel.launch.task import run_task as run

    run(task)
