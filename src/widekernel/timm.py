"""Runs a script as Python would, with the networks of widekernel registered with timm: `python -m widekernel.timm SCRIPT …`.

For scripts that make their networks by name and have no option to import a package first. The package is imported before
the script; the script is then `__main__`, with its own arguments and its own folder first on the path. Processes that the
script starts with `multiprocessing`, loader workers included, have the networks too, whichever way they are started.
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
    "Run a Python script with the networks of widekernel registered with timm. Everything after SCRIPT is the script's.\n"
)
_EXIT_ERROR = 2
_CHILD = "__mp_main__"
"""What `multiprocessing` calls the main module in a process that it has started afresh."""
_SCRIPT = "WIDEKERNEL_TIMM_SCRIPT"
"""Environment variable that tells such processes the path of the script; this command sets it."""


def main(arguments: Sequence[str], namespace: dict[str, Any]) -> int:
    """Run the script that the first argument names, in a namespace which thereby becomes that of the script.

    Returns:
        2, with a line on standard error, if there is no such script; otherwise 0, unless the script leaves another way.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(_USAGE)
        return 0 if arguments else _EXIT_ERROR
    script = arguments[0]
    wrong = _obstacle(script)
    if wrong:
        sys.stderr.write(f"error: {wrong}\n")
        return _EXIT_ERROR
    sys.argv[:] = arguments
    # As Python does: the folder of the file behind a link. With -P, or in a safe path, there is no folder to replace.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(script).resolve().parent)
    path = os.path.abspath(script)  # noqa: PTH100 - links stay, as Python leaves them
    os.environ[_SCRIPT] = path
    _execute(path, namespace, "__main__")
    return 0


def _obstacle(script: str) -> str:
    """Say why a script cannot be run, "" if it can be read."""
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
    """Execute a file with the names that Python gives a script. What is compiled is bytes: they say their own encoding."""
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    loader = importlib.machinery.SourceFileLoader(name, path)
    # `__spec__` stays that of this module: `multiprocessing` goes by it, and then runs this module in its children.
    names = {"__name__": name, "__file__": path, "__loader__": loader, "__spec__": namespace["__spec__"]}
    names |= {"__builtins__": builtins, "__package__": None, "__cached__": None, "__doc__": None}
    # Nothing of this module is left for the script to find, and from here on nothing of it can be used.
    namespace.clear()
    namespace.update(names)
    exec(code, namespace)


if __name__ == _CHILD:
    # Imported by now, the package has registered its networks. The parent's arguments are here, but for the first.
    sys.argv[0] = os.environ[_SCRIPT]
    _execute(sys.argv[0], globals(), _CHILD)
elif __name__ == "__main__":
    sys.exit(main(sys.argv[1:], globals()))
