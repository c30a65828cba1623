"""`python -m widekernel.timm SCRIPT`: scripts that create networks by name, in their own process and in new ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from widekernel.timm import main

SCRIPT = '''"""A script of somebody else's."""
import json, multiprocessing, sys
import beside, timm


class Seen:
    """What is pickled refers to the script by name."""

    def __init__(self, name):
        self.facts = [name, timm.is_model("slak_tiny"), sys.argv]


def child(queue, seen):
    queue.put(Seen(__name__))


if __name__ == "__main__":
    facts = {"name": __name__, "file": __file__, "doc": __doc__, "argv": sys.argv}
    facts |= {"path": sys.path[0], "beside": beside.HERE}
    facts["names"] = sorted(name for name in globals() if not name.startswith("__"))
    facts["known"] = timm.is_model("slak_tiny")
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, Seen("parent")))
    process.start()
    facts["child"] = queue.get(timeout=120).facts
    process.join()
    print(json.dumps(facts))
    sys.exit(7)
'''
NAMES_OF_THE_MODULE = {"main", "Path", "os", "io"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "widekernel.timm", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(SCRIPT)
    (tmp_path / "code" / "beside.py").write_text("HERE = 'a module beside the script'")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_and_a_process_that_it_starts(folder: Path, method: str) -> None:
    done = run(folder, "code/train.py", method, "--model", "slak_tiny")
    assert done.returncode == 7, done.stderr
    facts = json.loads(done.stdout)
    arguments = ["code/train.py", method, "--model", "slak_tiny"]
    assert facts["argv"] == arguments and facts["name"] == "__main__"
    assert facts["file"] == str(folder / "code" / "train.py") and facts["path"] == str((folder / "code").resolve())
    assert facts["doc"] == "A script of somebody else's." and facts["beside"] == "a module beside the script"
    assert not NAMES_OF_THE_MODULE & set(facts["names"]), "the script must not see names of this module"
    assert facts["known"] and facts["child"] == ["__mp_main__", True, arguments]


@pytest.mark.slow
def test_errors_of_the_script_are_unchanged(folder: Path) -> None:
    (folder / "bad.py").write_text("import timm\nprint('begun')\nraise KeyError('of the script')\n")
    done = run(folder, "bad.py")
    assert done.returncode == 1 and done.stdout == "begun\n"
    assert done.stderr.endswith("KeyError: 'of the script'\n") and f'File "{folder / "bad.py"}", line 3' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no.py", "--model", "x"], "there is no file no.py (the current folder is "),
        (["code"], "code is a folder: give the path of a Python file"),
        (["--model", "slak_tiny"], "SCRIPT is '--model', but this command has no options"),
    ],
)
def test_invalid_scripts(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    monkeypatch.chdir(folder)
    before, environment = list(sys.argv), dict(os.environ)
    assert main(arguments, {}) == 2
    assert said in capsys.readouterr().err and sys.argv == before and dict(os.environ) == environment


def test_usage(capsys) -> None:
    assert main(["--help"], {}) == 0 and "python -m widekernel.timm SCRIPT" in capsys.readouterr().out
    assert main([], {}) == 2 and "SCRIPT" in capsys.readouterr().err
