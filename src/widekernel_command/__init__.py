"""The entry point of the command `widekernel`, outside the package so that `--help` imports neither PyTorch nor networks.

`import widekernel` registers its networks with timm, unless this package was imported before: then the commands do so.
"""


def main() -> int:
    """Run the command line, and return its exit code."""
    from widekernel.cli.main import main as run

    return run()
