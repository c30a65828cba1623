"""`widekernel bench` from the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from tests.bench.conftest import device_gpu, hasty, on_cpu, spoil, untimed  # noqa: F401 - fixtures

from widekernel import ops
from widekernel.bench import devices, gpu, rivals
from widekernel.cli.main import main
from widekernel.ops.cpu import library as native

pytestmark = pytest.mark.usefixtures("hasty", "untimed")

TINY = ["ops", "--shape", "1,4,8,8", "--kernel", "5x5", "--rounds", "1", "--threads", "1"]


def bench(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["bench", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_operators_to_console_and_files(tmp_path: Path, capsys) -> None:
    files = {kind: tmp_path / name for kind, name in (("csv", "t.csv"), ("markdown", "t.md"), ("plot", "t.png"))}
    options = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    with ops.trace() as ran:
        code, out, _ = bench(capsys, *TINY, *options)
    assert code == 0 and "1x4x8x8 5x5" in out and "FMA peak" in out
    shapes = {problem.shape for _, problem in ran.calls}
    assert (1, 4, 8, 8) in shapes and len(shapes) > 3, "the operator is checked on other shapes"
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row["direction"] for row in rows} == {"forward", "input gradient", "weight gradient"}
    page = files["markdown"].read_text()
    assert "`widekernel bench ops --shape 1,4,8,8 --kernel 5x5 --rounds 1 --threads 1`" in page
    assert "1 threads used" in page and str(tmp_path) not in page
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_passes_and_backend(tmp_path: Path, capsys) -> None:
    path = tmp_path / "t.csv"
    code, out, _ = bench(capsys, *TINY, "--passes", "weight,forward", "--backend", "portable", "--csv", str(path))
    assert code == 0 and "input gradient" not in out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["direction"] for row in rows] == ["forward"] * 2 + ["weight gradient"] * 2
    assert {row["backend"] for row in rows} == {"portable"}


def test_networks(tmp_path: Path, capsys) -> None:
    options = ["--batch", "2", "--size", "32", "--modes", "infer", "--rounds", "1"]
    code, out, _ = bench(
        capsys, "models", "replknet_nano", *options, "--csv", str(tmp_path / "m.csv"), "--markdown", str(tmp_path / "m.md")
    )
    assert code == 0 and "ours, folded" in out and "train" not in out
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    fused = 2 if native.load().reason is None else 0
    assert len(rows) == 10 + fused
    assert {(row["batch"], row["size"], row["model"]) for row in rows} == {("2", "32", "replknet_nano")}
    assert "`widekernel bench models replknet_nano --batch 2 --size 32" in (tmp_path / "m.md").read_text()


def test_pieces_of_networks(tmp_path: Path, capsys) -> None:
    files = ["--csv", str(tmp_path / "p.csv"), "--markdown", str(tmp_path / "p.md")]
    options = ["--pieces", "--batch", "1,2", "--size", "32", "--seconds", "0.01"]
    code, out, _ = bench(capsys, "models", "slak_nano", *options, *files)
    assert code == 0 and "all pieces" in out
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["batch"] for row in rows} == {"1", "2"} and {"stem", "depthwise", "head"} <= {row["piece"] for row in rows}
    assert "unobserved" in (tmp_path / "p.md").read_text()


def test_rivals_that_are_not_installed(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "reason_against", lambda rival: "not installed (a package)")
    options = ["--batch", "2", "--size", "32", "--modes", "infer", "--rounds", "1", "--rivals", "all"]
    code, out, err = bench(capsys, "models", "replknet_nano", *options)
    assert code == 0 and "OpenVINO is left out: not installed (a package)" in out + err
    code, _, err = bench(capsys, "models", "replknet_nano", "--rivals", "openvin")
    assert code == 2 and "openvino" in err
    code, _, err = bench(capsys, "models", "replknet_nano", "--rivals", "zentorch")
    assert code == 2 and "must be those that can run (zentorch is left out: not installed (a package))" in " ".join(
        err.split()
    )


def test_nothing_is_timed_if_the_operator_is_wrong(tmp_path: Path, capsys, spoil) -> None:  # noqa: F811
    spoil(lambda problem: True)
    for arguments in (TINY, ["models", "replknet_nano", "--size", "32"]):
        code, out, err = bench(capsys, *arguments, "--csv", str(tmp_path / "t.csv"))
        assert code == 2 and "Nothing is timed" in err and "wrong computes" in err and not out
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["op"], "cannot time 'op'. Did you mean 'ops'?"),
        (["ops", "--cases", "slack-1"], "unknown case 'slack-1'. Did you mean 'slak-1'?"),
        (["ops", "--shape", "1,2,3,4"], "needs both, --shape and --kernel"),
        (["ops", "--shape", "1,2,3", "--kernel", "3x3"], "must be four numbers"),
        ([*TINY, "--batch", "3"], "leave batch out"),
        ([*TINY, "--passes", "forwards"], "passes has 'forwards'. Did you mean 'forward'?"),
        ([*TINY, "--backend", "portabel"], "backend is 'portabel', which does not exist. Did you mean 'portable'?"),
        ([*TINY, "--algorithm", "fast"], "unknown algorithm 'fast'"),
        ([*TINY[:-1], "0"], "threads is 0, but must be positive"),
        ([*TINY, "--seconds", "0"], "seconds is 0.0, but must be positive"),
        ([*TINY, "--csv", "times.txt"], "csv is 'times.txt', but must be a .csv file"),
        ([*TINY, "--plot", "no/such/folder.png"], "must be in a folder that exists"),
        ([*TINY, "--roundz", "3"], "no option --roundz. Did you mean '--rounds'?"),
        (["models", "slak_tinny"], "'slak_tinny', which is not a registered model. Did you mean 'slak_tiny'?"),
        (["models", "slak_nano", "--modes", "fit"], "modes has 'fit'. It takes train, infer"),
        (["models", "slak_nano", "--size", "0"], "size is 0, but must be positive"),
        (["models"], "names is [], but must be at least one model"),
        (["models", "slak_nano", "--pieces", "--rivals", "all"], "rivals is 'all', but must be left out with --pieces"),
        (["models", "slak_nano", "--pieces", "--compile"], "compile is True, but must be left out with --pieces"),
        (["models", "slak_nano", "--pieces", "--modes", "train"], "modes is 'train', but must be infer with --pieces"),
        (["models", "slak_nano", "--pieces", "--rounds", "3"], "rounds is 3, but must be left out with --pieces"),
        (["models", "slak_nano", "--batch", "2,x"], "batch is '2,x', but must be positive whole numbers with commas"),
        (["models", "slak_nano", "--batch", "0"], "batch is '0', but must be positive whole numbers"),
        ([*TINY, "--device", "mps"], "device is 'mps', but benchmarks run on cpu, cuda or cuda:N only"),
        ([*TINY, "--dtypes", "bfloat61"], "dtypes has 'bfloat61'. Did you mean 'bfloat16'?"),
        ([*TINY, "--device", "cuda", "--dtypes", "fp8"], "dtypes has 'fp8'"),
        ([*TINY, "--dtypes", "float32,tf32"], "dtypes is 'float32,tf32', but must be float32 on the CPU"),
        ([*TINY, "--minutes", "3"], "minutes is 3.0, but must be left out on the CPU"),
        ([*TINY, "--minutes", "0"], "minutes is 0.0, but must be positive"),
        (["ops", "--batch", "0"], "batch is 0, but must be positive"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments: list[str], message: str, capsys) -> None:
    code, out, err = bench(capsys, *arguments)
    assert code == 2 and message in " ".join(err.split()) and not out


@pytest.mark.parametrize("arguments", [TINY, ["models"], ["models", "slak_nano"]], ids=" ".join)
def test_cuda_without_a_device(arguments: list[str], capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        code, out, err = bench(capsys, *arguments, "--device", device)
        assert code == 2 and f"device is '{device}', but PyTorch" in err and "finds no CUDA device" in " ".join(err.split())
        assert not out


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, on_cpu, device_gpu) -> None:  # noqa: F811
    """Pretend that there is a CUDA device, which is the CPU."""
    monkeypatch.setattr(devices, "accelerator", lambda text: on_cpu)
    monkeypatch.setattr(gpu, "measure_gpu", lambda accelerator: device_gpu)


CUDA = ["--device", "cuda", "--rounds", "1", "--threads", "1"]


def test_operators_on_a_device(tmp_path: Path, capsys, pretended: None) -> None:
    files = {kind: tmp_path / name for kind, name in (("csv", "t.csv"), ("markdown", "t.md"), ("plot", "t.png"))}
    options = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    code, out, _ = bench(capsys, "ops", "--shape", "2,4,8,8", "--kernel", "5x5", *CUDA, *options)
    assert code == 0 and "2x4x8x8 5x5" in out and "GPU: Some GPU" in out
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 * 2 and [row["dtype"] for row in rows[::6]] == ["bfloat16", "tf32", "float16", "float32"]
    page = files["markdown"].read_text()
    assert "`widekernel bench ops --shape 2,4,8,8 --kernel 5x5 --device cuda --rounds 1 --threads 1`" in page
    assert "- driver 1, PyTorch 2" in page and "of floor: a share of 1 cannot be reached" in page
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_defaults_and_budget_of_a_device(tmp_path: Path, capsys, pretended: None) -> None:
    arguments = ["ops", "--cases", "small-map", "--dtypes", "float16", "--minutes", "1e-9", *CUDA]
    code, out, _ = bench(capsys, *arguments, "--markdown", str(tmp_path / "t.md"), "--plot", str(tmp_path / "t.png"))
    left_out = (
        "Left out in float16: small-map (forward, input gradient, weight gradient), because the 1e-09 minutes were over"
    )
    assert code == 0 and left_out in out and left_out in (tmp_path / "t.md").read_text()
    code, out, _ = bench(capsys, *arguments[:3], "--passes", "forward", *arguments[3:5], *CUDA)
    assert code == 0 and "64x64x7x7 13x13" in out and "│ float32" not in out and "│ float16" in out


def test_a_wrong_operator_on_a_device(tmp_path: Path, capsys, pretended: None, spoil) -> None:  # noqa: F811
    """Rows that are right are kept, and the command still fails."""
    spoil(lambda problem: problem.op == "depthwise_weight_grad")
    arguments = ["ops", "--shape", "2,4,8,8", "--kernel", "5x5", "--dtypes", "float32", *CUDA]
    code, out, err = bench(capsys, *arguments, "--csv", str(tmp_path / "t.csv"))
    assert code == 2 and "no times for 2 of the benchmarks" in err and "weight gradient of given" in out
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ours_ms"] != "" for row in rows] == [True] * 4 + [False] * 2
    assert all("differs from float64" in row["remark"] for row in rows[4:])


@pytest.mark.slow
def test_networks_on_a_device(tmp_path: Path, capsys, pretended: None) -> None:
    arguments = ["models", "replknet_nano", "--batch", "2,3", "--size", "32", "--modes", "infer", *CUDA]
    code, out, _ = bench(capsys, *arguments, "--csv", str(tmp_path / "m.csv"), "--markdown", str(tmp_path / "m.md"))
    assert code == 0 and "│ bfloat16" in out and "│ float32" not in out
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["batch"] for row in rows] == ["2"] * 10 + ["3"] * 10
    page = (tmp_path / "m.md").read_text()
    assert page.startswith("# Networks on a GPU") and "--batch 2,3" in page and "GPU: Some GPU" in page


def test_default_networks_on_a_device(capsys, pretended: None) -> None:
    code, out, _ = bench(capsys, "models", "--minutes", "1e-9", *CUDA)
    for name in ("replknet_31b", "slak_tiny", "shiftwise_tiny", "convnext_tiny"):
        assert code == 0 and f"{name}, 64 images (train, infer), {name}, 128 images (train, infer)" in out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(tmp_path: Path, capsys) -> None:
    files = [("csv", "t.csv"), ("markdown", "t.md"), ("plot", "t.png")]
    options = [part for kind, name in files for part in (f"--{kind}", str(tmp_path / name))]
    options += ["--cases", "small", "--batch", "4", "--seconds", "0.01"]
    code, out, err = bench(capsys, "ops", "--device", "cuda", *options)
    assert code == 0, err
    assert "compute capability" in out and (tmp_path / "t.csv").read_text().count("\n") == 1 + 5 * 4 * 3 * 2
    code, out, err = bench(capsys, "models", "replknet_nano", "--device", "cuda:0", "--batch", "4", "--seconds", "0.01")
    assert code == 0 and "ours, folded" in out, err


def test_help(capsys) -> None:
    assert bench(capsys, "--help")[0] == 0
    code, out, _ = bench(capsys)
    assert code == 2 and "{ops,branches,models,pointwise,sweep}" in out
