"""Where the command `widekernel` starts: outside the package, so that `--help` need not import PyTorch and the networks.

`import widekernel` registers its networks with timm. When this package is there first, it leaves that to the commands.
"""


def main() -> int:
    """Run the command line, and return its exit code."""
    from widekernel.cli.main import main as run

    return run()
