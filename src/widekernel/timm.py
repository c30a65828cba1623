"""Program that runs a script with widekernel's networks registered in timm: `python -m widekernel.timm SCRIPT ...`.

It is for scripts that create networks by name and have no option to import a package first. The program imports widekernel
and then runs the script as Python would: as `__main__`, with its own arguments, and its own folder first on the path.
Processes that the script starts with `multiprocessing`, such as loader workers, have the networks too, whatever the start
method.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_USAGE = (
    "usage: python -m widekernel.timm SCRIPT [ARGUMENTS]\n\n"
    "Run a Python script with the networks of widekernel registered with timm. Everything after SCRIPT is passed to it.\n"
)
_EXIT_ERROR = 2
_CHILD = "__mp_main__"
"""Name that `multiprocessing` gives the main module in a new process."""
_SCRIPT = "WIDEKERNEL_TIMM_SCRIPT"
"""Environment variable with the path of the script, which this program sets for such processes."""


def main(arguments: Sequence[str], namespace: dict[str, Any]) -> int:
    """Run the script that the first argument names.

    Args:
        arguments: path of the script and its arguments.
        namespace: global names of `__main__`, which become those of the script.

    Returns:
        0, unless the script itself exits; 2, with a message on standard error, if the script cannot be run.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(_USAGE)
        return 0 if arguments else _EXIT_ERROR
    script = arguments[0]
    problem = _script_problem(script)
    if problem:
        sys.stderr.write(f"error: {problem}\n")
        return _EXIT_ERROR
    sys.argv[:] = arguments
    # Like Python, use the folder of the file that a link points to. With `-P` (safe path), there is none to replace.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(script).resolve().parent)
    path = os.path.abspath(script)  # noqa: PTH100 - like Python, keep links
    os.environ[_SCRIPT] = path
    _execute(path, namespace, "__main__")
    return 0


def _script_problem(script: str) -> str:
    """Return why a script cannot be run, or "" if it can."""
    fix = "give the path of a Python file, and after it the script's own arguments"
    if script.startswith("-"):
        return f"SCRIPT is {script!r}, but this command has no options: {fix}"
    path = Path(script)
    if path.is_dir():
        return f"{script} is a folder: {fix}"
    if not path.exists():
        return f"there is no file {script} (the current folder is {Path.cwd()}): {fix}"
    if not os.access(path, os.R_OK):
        return f"{script} may not be read by this user: {fix}"
    return ""


def _execute(path: str, namespace: dict[str, Any], name: str) -> None:
    """Execute a file with the global names that Python gives a script; `compile` finds its encoding in the bytes."""
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    loader = importlib.machinery.SourceFileLoader(name, path)
    # `__spec__` stays that of this module, by which `multiprocessing` finds the module to run in new processes.
    names = {"__name__": name, "__file__": path, "__loader__": loader, "__spec__": namespace["__spec__"]}
    names |= {"__builtins__": builtins, "__package__": None, "__cached__": None, "__doc__": None}
    # The script must not see the names of this module, so none of them can be used after this.
    namespace.clear()
    namespace.update(names)
    exec(code, namespace)


if __name__ == _CHILD:
    # The package is imported and has registered its networks. Python has set all arguments but the first.
    sys.argv[0] = os.environ[_SCRIPT]
    _execute(sys.argv[0], globals(), _CHILD)
elif __name__ == "__main__":
    sys.exit(main(sys.argv[1:], globals()))
