"""The entry point of `widekernel`, which runs a command and prints expected errors as one message."""

import codecs
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from widekernel import __version__
from widekernel.engine.interrupts import Interrupted
from widekernel.engine.process_environment import refuse_several
from widekernel.errors import WidekernelError, nearest

COMMANDS = {
    "train": "train a classifier; resume a run, or report its result",
    "eval": "measure the accuracy of a run or checkpoint on a data set",
    "predict": "classify or segment images, or detect objects in them, and draw the result",
    "sparsify": "make a trained network sparse, 2:4 or in other blocks",
    "fold": "merge the branches of a checkpoint into its deployed form",
    "models": "list the models",
    "weights": "list, show or fetch the authors' published weights",
    "recipes": "list the training recipes",
    "complexity": "count the parameters and operations of a model",
    "export": "write a network for onnxruntime, OpenVINO or PyTorch alone, and check the file",
    "erf": "measure and draw effective receptive fields",
    "shape-bias": "measure whether classifiers go by shape or by texture",
    "report": "write everything about a network to one HTML page",
    "bench": "time operators or networks against PyTorch on this machine",
    "tune": "find and store the fastest configurations of the GPU kernels on this machine",
    "demo": "train, evaluate, fold, save and plot a large-kernel network on real digits",
}

_ALONE = ("sparsify", "fold", "predict", "export", "erf", "shape-bias", "report", "bench", "tune", "demo")
"""Commands that work in one process only."""

EXIT_ERROR = 2
_RAW_NAMES = "widekernel: raw bytes of file names"


def _write_raw_names(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write undecodable bytes of file names unchanged, and escape characters that the terminal cannot show."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    try:
        return part.encode("ascii", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return part.encode("ascii", "backslashreplace"), error.end


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, that of an expected error (usually 2), or 128 + n for signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    codecs.register_error(_RAW_NAMES, _write_raw_names)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_RAW_NAMES)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0 if arguments else EXIT_ERROR
    if arguments[0] == "--version":
        sys.stdout.write(f"widekernel {__version__}\n")
        return 0
    try:
        return _run(arguments[0], arguments[1:])
    except WidekernelError as error:
        if os.environ.get("WIDEKERNEL_TRACEBACK"):
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except Interrupted as interruption:  # the command has printed a message
        return 128 + interruption.signal_number
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The program at the other end of the pipe, such as head or less, has closed it.
        sys.stderr.close()
        return 0


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        raise WidekernelError(
            f"There is no command {command!r}.{nearest(command, COMMANDS)} Commands: {', '.join(COMMANDS)}."
        )
    if command in _ALONE and not {"-h", "--help"} & set(arguments):
        refuse_several(command)
    module = importlib.import_module(f"widekernel.cli.{command.replace('-', '_')}")
    return module.run(arguments)


def _usage() -> str:
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return (
        "usage: widekernel COMMAND [OPTIONS]\n\nConvNets with very wide and very sparse kernels.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`widekernel COMMAND --help` explains the options, `widekernel --version` prints the version.\n"
    )
