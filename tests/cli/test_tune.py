"""`widekernel tune` from the command line, on a simulated GPU: kernels are interpreted, and times are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from widekernel import ops
from widekernel.bench.devices import Accelerator
from widekernel.bench.errors import DeviceLostError
from widekernel.bench.lookup import build_network
from widekernel.bench.precision import BFLOAT16, FLOAT32, TF32
from widekernel.bench.timing import WallClock
from widekernel.cli import tune, tune_session
from widekernel.cli.main import main
from widekernel.cli.tune_problems import Runs, problems_of_case, problems_of_network
from widekernel.errors import ConfigError
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.gpu import baselines, machine, tuning, tuning_tables
from widekernel.ops.gpu.config_choice import INTERPRETED_CHIP, ranked_configs
from widekernel.ops.gpu.kernel_configs import KernelConfig
from widekernel.ops.gpu.tuning import MeasurementSetup
from widekernel.ops.problem import DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES, DEPTHWISE_WEIGHT_GRAD, Problem

TRITON = TritonBackend()

pytestmark = pytest.mark.interpreted

GPU = "interpreter"
TINY = ["--shape", "2,3,8,8", "--kernel", "5x5", "--candidates", "2"]
SUM = "depthwise_sum bfloat16 NCHW N2 C4 8x8 5x5@2,2"
GRAD = "depthwise_weight_grad bfloat16 NCHW N2 C4 8x8 5x5@2,2"
CPU = torch.device("cpu")


def clock(calls: Mapping[str, object]) -> dict[str, float]:
    """Pretend that each call takes a microsecond less than the one before, and PyTorch 100 of them."""
    return {name: (100 if name.startswith("PyTorch") else 50 - i) * 1e-6 for i, name in enumerate(calls)}


@pytest.fixture(autouse=True)
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of this machine's table, which does not exist; neither does the shipped one."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv(tuning_tables.VARIABLE, str(path))
    monkeypatch.setattr(tuning_tables, "SHIPPED", tmp_path / "shipped.json")
    return path


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Pretend that there is a GPU, which is the CPU; return a function that changes how it measures."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled, for tensors on the GPU")

    def pretend(measure: Callable = clock, **more) -> None:
        monkeypatch.setattr(
            tune_session, "setup_on", lambda device, seconds: MeasurementSetup(CPU, GPU, INTERPRETED_CHIP, measure, **more)
        )

    pretend()
    return pretend


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["tune", *arguments])
    said = capsys.readouterr()
    return code, said.out, " ".join(said.err.split())


def test_one_case_is_tuned(tuned: Path, capsys, pretended) -> None:
    x, kernel = torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16), torch.zeros(3, 1, 5, 5, dtype=torch.bfloat16)
    assert "estimated" in ops.explain(x, [kernel], backend="triton")[0].details
    code, out, _ = run(capsys, *TINY, "--report")
    assert code == 0 and f"2 entries for {GPU} written to {tuned}." in out
    entries = tuning_tables.read(tuned)[GPU]
    assert sorted(entries) == [SUM, GRAD], "the input gradient is the same problem as the forward pass"
    assert entries[SUM]["us"] == 49 and entries[SUM]["pytorch_us"] == 100
    assert {"torch", "triton", "widekernel", "error", "candidates", "device"} < set(entries[SUM])
    for explained, of in zip(ops.explain(x, [kernel], backend="triton"), (SUM, SUM, GRAD)):
        assert explained.details == f"{tuning_tables.entry_config(entries[of])}; tuned on this machine"
        assert f"│ {of}" in out and str(tuning_tables.entry_config(entries[of])) in out
    assert "PyTorch, as a forward convolution" in out and "2.04" in out


def test_a_second_run_continues(tuned: Path, capsys, pretended) -> None:
    code, out, _ = run(capsys, *TINY, "--minutes", "1e-9")
    assert code == 0 and not tuned.exists() and "0 entries" in out
    assert "Left out in this run: problems (" in out and "because the 1e-09 minutes were over; --minutes gives more" in out
    assert SUM in out and GRAD in out
    run(capsys, *TINY)
    before = tuning_tables.read(tuned)
    code, out, _ = run(capsys, *TINY, "--minutes", "1e-9")
    assert code == 0 and "2 problems were tuned before with these versions: --again" in out and "Left out" not in out
    code, out, _ = run(capsys, *TINY[:-1], "3")
    assert "2 entries" in out and tuning_tables.read(tuned)[GPU][SUM]["candidates"] == 3
    pretended(lambda calls: dict.fromkeys(calls, 1e-6))
    assert "2 entries" in run(capsys, *TINY, "--again")[1] and tuning_tables.read(tuned)[GPU][SUM]["us"] == 1
    content = json.loads(tuned.read_text())
    content["gpus"][GPU][SUM]["triton"] = "1.0"
    tuned.write_text(json.dumps(content))
    assert "1 entries" in run(capsys, *TINY)[1] and set(tuning_tables.read(tuned)[GPU]) == set(before[GPU])


def test_tables_of_other_kinds(tuned: Path, tmp_path: Path, capsys, pretended) -> None:
    for option, gpu in (("--output", GPU), ("--table", "sm_90")):
        path = tmp_path / f"{gpu}.json"
        tuning_tables.merge(path, "another", {"k": {"config": ranked_config()}})
        code, out, _ = run(capsys, *TINY, option, str(path))
        assert code == 0 and f"2 entries for {gpu} written to {path}." in out and not tuned.exists()
        assert set(tuning_tables.read(path)) == {"another", gpu} and tuning_tables.read(path)[gpu][SUM]["device"] == GPU


def ranked_config() -> dict:
    (problem,) = {p for p in problems_of_case(case(), Runs(1, [], [BFLOAT16], ["NCHW"]), CPU) if "sum" in p.op}
    return ranked_configs(problem, INTERPRETED_CHIP)[0].to_entry()


def case():
    from widekernel.bench import parse_case

    return parse_case("2,3,8,8", "5x5")


def test_every_winner_is_written_at_once(tuned: Path, capsys, pretended) -> None:
    def second_fails(calls: Mapping[str, object]) -> dict[str, float]:
        if tuned.exists():
            raise KeyboardInterrupt
        return clock(calls)

    pretended(second_fails)
    assert run(capsys, *TINY)[0] == 130 and len(tuning_tables.read(tuned)[GPU]) == 1


def test_wrong_results_are_an_error(tuned: Path, capsys, pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = {p for p in problems_of_case(case(), Runs(1, [], [BFLOAT16], ["NCHW"]), CPU) if "sum" in p.op}
    first, second = (str(config) for config in ranked_configs(problem, INTERPRETED_CHIP)[:2])

    def corrupted(of: Problem, config: KernelConfig, *others: Any) -> Callable[[], torch.Tensor]:
        call = baselines.kernel_call(of, config, *others)
        return (lambda: call() + 1) if str(config) == first else call

    monkeypatch.setattr(tuning, "kernel_call", corrupted)
    code, out, err = run(capsys, *TINY)
    assert code == 2 and f"1 configurations compute wrong results and were not chosen: {SUM}: {first} differs from" in err
    assert str(tuning_tables.entry_config(tuning_tables.read(tuned)[GPU][SUM])) == second and "1 of 2 failed" in out


def test_no_configuration_works(tuned: Path, capsys, pretended) -> None:
    def lost() -> None:
        raise DeviceLostError("the device takes no more calls")

    def fails(calls: Mapping[str, object]) -> dict[str, float]:
        raise RuntimeError("misaligned address")

    pretended(fails)
    code, out, err = run(capsys, *TINY)
    assert code == 2 and "2 problems have no configuration that works" in err and "misaligned address" in out
    pretended(fails, recover=lost)
    code, out, err = run(capsys, *TINY)
    first, second = (SUM, GRAD) if f"problems ({GRAD})" in out else (GRAD, SUM)
    assert code == 2 and f"Left out in this run: problems ({second}), because {first}: the device takes no more" in out
    assert not tuned.exists()


def test_branches_left_to_pytorch_are_tuned_alone(tuned: Path, capsys, pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    both = (DEPTHWISE_BRANCHES, "cpu", torch.float32, (2, 3, 8, 8), ((7, 7), (3, 3)), ((3, 3), (1, 1)))
    monkeypatch.setattr(tune, "_problems", lambda values, setup: [Problem(*both)])
    pretended(lambda calls: {name: 1e-6 if name.startswith("PyTorch") else 1e-5 for name in calls})
    code, out, _ = run(capsys, *TINY)
    assert code == 0 and "left to PyTorch" in out
    keys = list(tuning_tables.read(tuned)[GPU])
    alone = [f"depthwise_sum float32 NCHW N2 C4 8x8 {kernel}" for kernel in ("3x3@1,1", "7x7@3,3")]
    assert keys == ["depthwise_branches float32 NCHW N2 C4 8x8 7x7@3,3+3x3@1,1", *alone]
    assert run(capsys, *TINY)[1].startswith("3 problems were tuned before")
    pretended()
    assert "1 entries" in run(capsys, *TINY, "--again")[1], "with fused branches nothing else is of use"


def test_problems_of_a_network() -> None:
    runs = Runs(64, ["train", "infer"], [BFLOAT16, FLOAT32], ["NCHW"])
    if torch.cuda.is_available():
        pytest.skip("on a GPU other problems are taken")
    with ops.trace() as ran:
        found = problems_of_network(build_network("replknet_nano")[0], 64, runs, CPU)
    assert len({name for name, _ in ran.calls}) == 1 and "recording" in ran.calls[0][0]
    assert ran.calls[0][0] not in ops.backends()
    assert {problem.dtype for problem in found} == {torch.bfloat16, torch.float32}
    assert {problem.shape for problem in found} == {(64, 16, 16, 16), (64, 32, 8, 8), (64, 64, 4, 4), (64, 128, 2, 2)}
    wide = {problem.op: problem.kernels for problem in found if problem.shape[1] == 16}
    assert set(wide) == {"depthwise_sum", DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES, DEPTHWISE_WEIGHT_GRAD}
    assert wide["depthwise_sum"] == ((31, 31),) and wide[DEPTHWISE_BRANCHES] == ((31, 31), (3, 3)), "folded and not"
    only = problems_of_network(build_network("replknet_nano")[0], 64, Runs(2, ["infer"], [FLOAT32], ["NHWC"]), CPU)
    assert {problem.op for problem in only} == {"depthwise_sum"} and all(problem.channels_last for problem in only)


def test_networks_without_our_operators_are_accelerated() -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU other problems are taken")
    runs = Runs(4, ["infer"], [BFLOAT16], ["NCHW"])
    assert not problems_of_network(build_network("test_resnet")[0], 64, runs, CPU)
    found = problems_of_network(build_network("convnext_atto")[0], 64, runs, CPU)
    assert {problem.kernels for problem in found} == {((7, 7),)} and {problem.shape[0] for problem in found} == {4}


def test_problems_of_a_case() -> None:
    found = problems_of_case(case(), Runs(1, [], [BFLOAT16, TF32], ["NCHW", "NHWC"]), torch.device("cuda"))
    assert len(found) == 8 and sum(found.values()) == 12
    assert {(problem.dtype, problem.tf32) for problem in found} == {(torch.bfloat16, False), (torch.float32, True)}
    assert {problem.channels_last for problem in found} == {True, False}


def test_show_and_forget(tuned: Path, capsys, pretended) -> None:
    code, out, _ = run(capsys, "--show")
    assert code == 0 and f"This machine's table: none, {tuned} does not exist." in out and "Shipped table: none" in out
    assert f"There is nothing to forget: {tuned} does not exist." in run(capsys, "--forget")[1]
    run(capsys, *TINY)
    tuning_tables.merge(tuning_tables.SHIPPED, "sm_90", {"k": {"config": ranked_config(), "us": None, "pytorch_us": None}})
    code, out, _ = run(capsys, "--show")
    assert code == 0 and SUM in out and "49.0" in out and "triton" in out
    # Above a table, a long path is broken into lines.
    assert "".join(f"Shipped table: {tuning_tables.SHIPPED}, sm_90".split()) in "".join(out.split())
    assert f"Removed {tuned}: 2 entries for {GPU}." in run(capsys, "--forget")[1] and not tuned.exists()
    tuned.write_text("{")
    code, out, err = run(capsys, "--show")
    assert code == 2 and "cannot be read as a table" in err and not out
    assert "it was not a readable table" in run(capsys, "--forget")[1] and not tuned.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "names is [], but must be at least one model, or a case by --shape and --kernel"),
        (["slak_tini"], "'slak_tini', which is not a registered model. Did you mean 'slak_tiny'?"),
        (["slak_nano", "--batch", "0"], "batch is 0, but must be positive"),
        (["slak_nano", "--batch", "many"], "batch"),
        (["slak_nano", "--size", "-1"], "size is -1, but must be positive"),
        (["slak_nano", "--minutes", "0"], "minutes is 0.0, but must be positive"),
        (["slak_nano", "--minutes", "nan"], "minutes"),
        (["slak_nano", "--candidates", "0"], "candidates is 0, but must be positive"),
        (["slak_nano", "--seconds", "inf"], "seconds"),
        (["slak_nano", "--dtypes", "bfloat61"], "dtypes has 'bfloat61'. Did you mean 'bfloat16'?"),
        (["slak_nano", "--modes", "fit"], "modes has 'fit'. It takes train, infer"),
        (["slak_nano", "--layouts", "NCWH"], "layouts has 'NCWH'. Did you mean 'NCHW'?"),
        (["slak_nano", "--kernel", "5x5"], "needs both, --shape and --kernel"),
        ([*TINY, "--batch", "3", "--modes", "infer"], "leave batch, modes out"),
        ([*TINY, "slak_nano"], "leave names out"),
        (["--shape", "1,2,3", "--kernel", "3x3"], "must be four numbers"),
        (["--shape", "1,2,3,4", "--kernel", "4x4"], "must be positive odd numbers"),
        ([*TINY, "--output", "a", "--table", "b"], "--output and --table name different kinds of tables"),
        ([*TINY, "--output", "no/such/folder.json"], "output is 'no/such/folder.json', which cannot be written (No such"),
        ([*TINY, "--table", "."], "table is '.', but must be a file, not a folder"),
        (["--show", "--report"], "show is True, but must be the only argument: give --show alone"),
        (["slak_nano", "--forget"], "forget is True, but must be the only argument: give --forget alone"),
        ([*TINY, "--agian"], "no option --agian. Did you mean '--again'?"),
        (["vit_tiny_patch16_224", "--size", "65"], "does not run on images of 65x65"),
        (["test_resnet", "--size", "64"], "test_resnet has no depthwise convolution that our kernels can compute"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments: list[str], message: str, tuned: Path, capsys, pretended) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and message in err and not out and not tuned.exists()


def test_no_table_to_write(tmp_path: Path, capsys, pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning_tables.VARIABLE, "0")
    code, out, err = run(capsys, *TINY)
    assert code == 2 and f"{tuning_tables.VARIABLE} is 0, so that this machine has no table: set" in err and not out
    assert run(capsys, *TINY, "--output", str(tmp_path / "o.json"))[0] == 0 and (tmp_path / "o.json").exists()
    assert "none, WIDEKERNEL_TUNED is 0" in run(capsys, "--show")[1]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuning_tables.VARIABLE, str(tmp_path / "file" / "deep" / "tuned.json"))
    code, out, err = run(capsys, *TINY)
    assert code == 2 and "the table of this machine is" in err and "cannot be written" in err and "--output FILE" in err
    monkeypatch.setenv(tuning_tables.VARIABLE, str(tmp_path / "new" / "deep" / "tuned.json"))
    assert run(capsys, *TINY)[0] == 0 and (tmp_path / "new" / "deep" / "tuned.json").exists()


def test_a_damaged_table_is_not_overwritten(tuned: Path, capsys, pretended) -> None:
    tuned.write_text("{")
    code, out, err = run(capsys, *TINY)
    assert code == 2 and f"{tuned} cannot be read as a table of configurations" in err and "remove it" in err and not out
    assert tuned.read_text() == "{"


def test_without_a_gpu(tuned: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run(capsys, *TINY)
    assert code == 2 and "device is 'cuda', but PyTorch" in err and "finds no CUDA device: tune where" in err and not out
    code, out, err = run(capsys, *TINY, "--device", "cpu")
    assert code == 2 and "device is 'cpu', but must be cuda or cuda:N" in err


def test_setup_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's settings are in force while the device is measured, and restored afterwards."""
    if torch.cuda.is_available():
        pytest.skip("the device would have to be the CPU")
    monkeypatch.setattr(tune_session, "_accelerator", lambda *_: Accelerator(CPU, WallClock()))
    monkeypatch.setattr(machine, "obstacles", lambda device: ["it is too old"])
    with pytest.raises(ConfigError, match="device is 'cuda:0', but it is too old"):
        tune_session.setup_on("cuda:0", 1e-4)
    monkeypatch.setattr(machine, "obstacles", lambda device: [])
    setup = tune_session.setup_on("cuda:0", 1e-4)
    assert (setup.device, setup.name, setup.chip) == (CPU, GPU, INTERPRETED_CHIP)
    before = torch.backends.cudnn.benchmark
    problems = problems_of_case(case(), Runs(1, [], [BFLOAT16], ["NCHW"]), CPU)
    for problem in problems:
        with setup.conditions(problem):
            assert torch.backends.cudnn.benchmark
        done = tuning.Tuning(problem, setup, 1)
        done.run()
        assert done.best is not None and 0 < done.best.seconds < 10 and done.fallback_seconds > 0
    with setup.conditions(Problem("depthwise_sum", "cuda", torch.float32, (1, 1, 1, 1), ((1, 1),), ((0, 0),), tf32=True)):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.benchmark == before and torch.get_float32_matmul_precision() == "highest"


def test_calls_are_measured_in_turns() -> None:
    now, turns = [0.0], []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def take() -> None:
            turns.append(name)
            now[0] += seconds

        return take

    calls = {"a": call("a", 0.01), "b": call("b", 0.002)}
    seconds = tune_session.median_seconds(calls, WallClock(lambda: now[0]), 0.1)
    assert seconds == pytest.approx({"a": 0.01, "b": 0.002})
    assert turns.count("b") > turns.count("a") >= 5 and turns[-20:].count("a") > 0


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["tune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert leaving.value.code == 0 and "keep computing others as before" in text and "--again" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(tuned: Path, capsys) -> None:
    settings = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    arguments = ["--shape", "4,64,14,14", "--kernel", "13x13", "--candidates", "3", "--seconds", "0.01"]
    code, out, err = run(capsys, *arguments, "--dtypes", "bfloat16,tf32", "--layouts", "NCHW,NHWC", "--report")
    assert code == 0, err + out
    entries = tuning_tables.read(tuned)[torch.cuda.get_device_name()]
    assert len(entries) == 8 and all(entry["us"] > 0 and entry["pytorch_us"] > 0 for entry in entries.values())
    problem = Problem("depthwise_sum", "cuda", torch.bfloat16, (4, 64, 14, 14), ((13, 13),), ((6, 6),))
    assert "tuned on this machine" in TRITON.describe(problem)
    code, out, err = run(capsys, "replknet_nano", "--size", "64", "--batch", "4", "--candidates", "2", "--seconds", "0.01")
    assert code == 0, err + out
    after = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    assert after == settings and tune.__doc__
