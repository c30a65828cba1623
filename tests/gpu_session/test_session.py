"""Requirements of a session: what the machine must have, and what it need not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_session import ready, session, wheels
from benchmarks.gpu_session.session import environment, main
from benchmarks.gpu_session.wheels import Wheel, is_needed, minima, unpack

ROOT = Path(__file__).resolve().parents[2]


def put(folder: Path, name: str, module: str = "absent_module") -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(f"{module}.py", "HERE = True\n")
    return folder / name


def test_names_of_wheels_are_parsed() -> None:
    plain = Wheel.of(Path("markdown_it_py-4.3.0-py3-none-any.whl"))
    assert (plain.name, plain.version) == ("markdown-it-py", "4.3.0") and plain.fits((3, 12))
    built = Wheel.of(Path("widekernel-0.4.0-0nocompiler-py3-none-any.whl"))
    assert built.version == "0.4.0" and built.fits((3, 10))
    numbers = Wheel.of(Path("x-1-cp312-cp312-manylinux_2_17_x86_64.whl"))
    assert numbers.fits((3, 12)) and not numbers.fits((3, 11)) and not numbers.fits((3, 13))
    stable = Wheel.of(Path("x-1-cp310-abi3-manylinux_2_17_x86_64.whl"))
    assert stable.fits((3, 12)) and not stable.fits((3, 9))
    with pytest.raises(ValueError, match="not named like a wheel"):
        Wheel.of(Path("x-1.whl"))


def test_only_what_is_missing_or_too_old_is_unpacked(tmp_path: Path) -> None:
    put(tmp_path, "absent_package-1.0-py3-none-any.whl")
    put(tmp_path, "torch-99.0-py3-none-any.whl", "torch_again")
    put(tmp_path, "other_absent-1.0-cp38-cp38-linux_x86_64.whl", "other")
    unpacked, foreign = unpack(tmp_path, tmp_path / "site")
    assert unpacked == ["absent-package 1.0"] and foreign == ["other-absent 1.0 (for cp38)"]
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["absent_module.py"]
    assert minima()["timm"] and minima()["torch"] and minima()["jsonargparse"]
    timm = Wheel(tmp_path, "timm", "1000", "py3", "none")
    assert is_needed(timm, {"timm": "1000"}) and not is_needed(timm, {"timm": "0.1"}) and not is_needed(timm, {})
    with pytest.raises(ValueError, match=r"not a folder of wheels: fill it .*`make offline-bundle`"):
        unpack(tmp_path / "none", tmp_path)


def test_unpacking_from_the_command_line(tmp_path: Path, capsys) -> None:
    put(tmp_path, "other_absent-1.0-cp38-cp38-linux_x86_64.whl")
    assert wheels.main([str(tmp_path), str(tmp_path / "site")]) == 2
    assert "for another Python than" in capsys.readouterr().err
    assert wheels.main(["one"]) == 2


def test_packages_to_download() -> None:
    pytest.importorskip("packaging")
    from benchmarks.gpu_session.bundle import ours, wanted

    def package(name: str, *needs: str) -> dict:
        return {"metadata": {"name": name, "version": "1.0", "requires_dist": list(needs)}}

    report = {
        "environment": {"python_version": "3.12", "sys_platform": "linux"},
        "install": [
            package("timm", "torch", "hub[fast]>=1", "never; sys_platform == 'win32'"),
            package("torch", "sympy", "shared"),
            package("sympy"),
            package("shared"),
            package("hub", "shared", "quick; extra == 'fast'", "slow; extra == 'slow'"),
            package("quick"),
            package("slow"),
            package("never"),
        ],
    }
    assert wanted(report, ["timm>=1"], ["torch==1.0"]) == ["hub==1.0", "quick==1.0", "timm==1.0"]
    assert any(line.startswith("timm>=") for line in ours()) and any(line.startswith("pytest>=") for line in ours())
    assert not any(line.startswith(("mypy", "ruff")) for line in ours())


def test_unusable_folders_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "tuned.json").write_text("{}")
    assert main(["--out", str(tmp_path)]) == 2
    assert f"--out is {tmp_path}, which holds tuned.json: give a new folder" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "tuned.json" / "x")]) == 2
    assert "where nothing can be written" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "new"), "--minutes", "nan"]) == 2
    assert "--minutes is nan" in capsys.readouterr().err


def test_stages_write_into_the_scratch_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    given = environment(tmp_path)
    for name in (
        "HOME",
        "TMPDIR",
        "XDG_CACHE_HOME",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "MPLCONFIGDIR",
        "HF_HOME",
    ):
        assert Path(given[name]).is_relative_to(tmp_path) and Path(given[name]).is_dir()
    assert "TRITON_INTERPRET" not in given
    assert given["PYTHONPATH"].split(os.pathsep) == [str(ROOT / "src"), str(ROOT), str(tmp_path / "site"), "/mine"]


def test_a_missing_gpu_is_reported(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ready, "NEEDED", ("torch",))
    assert ready.main([str(tmp_path / "facts.json")]) == 2
    assert "error: NO GPU: PyTorch" in capsys.readouterr().out and not (tmp_path / "facts.json").exists()
    monkeypatch.setattr(ready, "NEEDED", ("torch", "no_such_package"))
    assert ready.main([str(tmp_path / "facts.json")]) == 2
    assert "lacks no_such_package (ModuleNotFoundError" in capsys.readouterr().out


def test_a_session_without_any_packages(tmp_path: Path) -> None:
    """The program itself needs only Python, reports what is missing, and still leaves its files."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    (tmp_path / "wheels").mkdir()
    out = tmp_path / "deep" / "out"
    command = [tmp_path / "bare" / "bin" / "python", ROOT / "benchmarks" / "gpu_session", "--out", out, "--minutes", "1"]
    command += ["--wheels", tmp_path / "wheels"]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=plain)
    assert done.returncode == 1 and "error: this Python lacks torch (ModuleNotFoundError" in done.stdout, done.stderr
    content = json.loads((out / "summary.json").read_text())
    assert content["ended"] and content["stages"][0]["state"] == "failed"
    assert {each["state"] for each in content["stages"][1:]} == {"not run"}
    assert sorted(path.name for path in out.iterdir()) == ["session.log", "summary.json"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which need not be pretended")
def test_rehearsal(tmp_path: Path) -> None:
    """A whole session runs on a simulated GPU, without a network if the system allows namespaces."""
    out = tmp_path / "out"
    program = [sys.executable, ROOT / "benchmarks" / "gpu_session", "--rehearse", "--out", out, "--minutes", "12"]
    alone = ["unshare", "-rn"] if subprocess.run(["unshare", "-rn", "true"], check=False).returncode == 0 else []
    done = subprocess.run([*alone, *program], capture_output=True, text=True, check=False, cwd=tmp_path)
    content = json.loads((out / "summary.json").read_text())
    states = {each["stage"]: each["state"] for each in content["stages"]}
    assert content["rehearsal"] and content["machine"]["gpu"] == "a pretended GPU"
    assert states["ready"] == states["operators"] == "done", done.stdout
    assert "failed" not in states.values(), done.stdout
    rows = (out / "correctness.csv").read_text().splitlines()
    assert len(rows) > 20 and all(row.endswith(",right") for row in rows[1:])
    assert len(json.loads((out / "tuned.json").read_text())["gpus"]["a pretended GPU"]) > 2
    assert "triton" in (out / "ops.csv").read_text() and len(list(out.iterdir())) <= 8
    assert session.MINUTES == 9
