"""Tuning tables: their keys, their files, and the configurations that they lead to."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path

import pytest
import torch

from tests.ops.gpu.helpers import DEVICE
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.ops.backends import triton
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.gpu import machine, tuning_tables
from widekernel.ops.gpu.kernel_configs import DirectNchw, Flat, Toeplitz
from widekernel.ops.problem import DEPTHWISE_BRANCHES, DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, DIRECT, Problem

TRITON = TritonBackend()

X, KERNEL = torch.zeros(2, 3, 8, 8).to(DEVICE), torch.zeros(3, 1, 5, 5).to(DEVICE)
PROBLEM = Problem.of_sum(X, [KERNEL], [(2, 2)])
# Not the cheapest one by the estimate.
CONFIG = Flat(4, 2, pixels=64, images=16)
ENTRY = {"config": CONFIG.to_entry(), "us": 10.0, "pytorch_us": 20.0}


@pytest.fixture(autouse=True)
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of this machine's table, which does not exist; neither does the shipped one."""
    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv(tuning_tables.VARIABLE, str(path))
    monkeypatch.setattr(tuning_tables, "SHIPPED", tmp_path / "shipped.json")
    return path


def name() -> str:
    return machine.device_name()


@pytest.mark.parametrize(
    ("problem", "key"),
    [
        (
            Problem(DEPTHWISE_SUM, "cuda", torch.bfloat16, (48, 96, 56, 57), ((31, 29),), ((15, 14),)),
            "depthwise_sum bfloat16 NCHW N64 C128 56x57 31x29@15,14",
        ),
        (
            Problem(DEPTHWISE_BRANCHES, "cuda", torch.float16, (1, 1, 7, 7), ((51, 5), (5, 5)), ((25, 2), (0, 4)), True),
            "depthwise_branches float16 NHWC N1 C1 7x7 51x5@25,2+5x5@0,4",
        ),
        (
            Problem(DEPTHWISE_WEIGHT_GRAD, "cuda", torch.float32, (64, 65, 8, 8), ((3, 3),), ((1, 1),), tf32=True),
            "depthwise_weight_grad float32 tf32 NCHW N64 C128 8x8 3x3@1,1",
        ),
        (
            Problem(DEPTHWISE_SUM, "cuda", torch.float32, (2, 4, 8, 8), ((3, 3),), ((1, 1),), algorithm=DIRECT),
            "depthwise_sum float32 NCHW N2 C4 8x8 3x3@1,1 direct",
        ),
        (
            Problem(
                DEPTHWISE_BRANCHES,
                "cuda",
                torch.bfloat16,
                (64, 160, 28, 28),
                ((13, 13), (7, 6), (3, 3)),
                ((6, 6), (3, 5), (1, 1)),
                dilations=(1, 2, 13),
            ),
            "depthwise_branches bfloat16 NCHW N64 C256 28x28 13x13@6,6+7x6@3,5*2+3x3@1,1*13",
        ),
    ],
)
def test_keys_are_stable(problem: Problem, key: str) -> None:
    """Tables on the machines of users contain them."""
    assert tuning_tables.table_key(problem) == key


def test_file_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning_tables.VARIABLE, "0")
    assert tuning_tables.tuned_file() is None
    monkeypatch.delenv(tuning_tables.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_tables.tuned_file() == tmp_path / "widekernel" / "tuned.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning_tables.tuned_file() == tmp_path / "home" / ".cache" / "widekernel" / "tuned.json"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert tuning_tables.tuned_file() is None


def test_merging_keeps_existing_entries(tuned: Path) -> None:
    tuning_tables.merge(tuned, "A", {"k": ENTRY})
    tuning_tables.merge(tuned, "A", {"l": ENTRY})
    tuning_tables.merge(tuned, "B", {"k": ENTRY})
    tuning_tables.merge(tuned, "A", {"k": ENTRY | {"us": 1}})
    assert tuning_tables.read(tuned) == {"A": {"k": ENTRY | {"us": 1}, "l": ENTRY}, "B": {"k": ENTRY}}
    assert [path.name for path in tuned.parent.iterdir()] == ["tuned.json"]


def test_merging_follows_links(tuned: Path, tmp_path: Path) -> None:
    tuned.parent.mkdir()
    tuned.symlink_to(tmp_path / "elsewhere.json")
    tuning_tables.merge(tuned, "A", {"k": ENTRY})
    assert tuned.is_symlink() and "A" in tuning_tables.read(tmp_path / "elsewhere.json")


def test_merging_in_several_threads(tuned: Path) -> None:
    """No entries are lost, and at every moment the table is complete."""
    tuning_tables.merge(tuned, "A", {"first": ENTRY})

    def merge(number: int) -> None:
        for i in range(5):
            tuning_tables.merge(tuned, "A", {f"{number} {i}": ENTRY})

    threads = [threading.Thread(target=merge, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert "first" in tuning_tables.read(tuned)["A"]
    assert len(tuning_tables.read(tuned)["A"]) == 21


def test_an_interrupted_write_keeps_the_old_table(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning_tables.merge(tuned, "A", {"k": ENTRY})

    def no_room(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(OSError, match="No space"):
        tuning_tables.merge(tuned, "A", {"l": ENTRY})
    assert tuning_tables.read(tuned) == {"A": {"k": ENTRY}} and len(list(tuned.parent.iterdir())) == 1


DAMAGED = {
    "no JSON": "{",
    "not text": "\xff\x00",
    "a list": "[]",
    "too deep": "[" * 100_000,
    "of another format": json.dumps({"format": 2, "gpus": {}}),
    "without GPUs": json.dumps({"format": 1}),
    "GPUs without entries": json.dumps({"format": 1, "gpus": {"A": []}}),
    **{
        f"entry {entry}": json.dumps({"format": 1, "gpus": {"A": {"k": entry}}})
        for entry in (
            3,
            {},
            {"config": None},
            {"config": [["method", "flat"]]},
            {"config": {"method": ["flat"]}},
            {"config": {"method": "magic"}},
            {"config": {**CONFIG.to_entry(), "images": -1}},
            {"config": CONFIG.to_entry(), "us": "fast"},
            {"config": CONFIG.to_entry(), "us": True},
            {"config": CONFIG.to_entry(), "pytorch_us": 0},
            {"config": CONFIG.to_entry(), "pytorch_us": float("nan")},
        )
    },
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_tables_are_refused(content: str, tuned: Path) -> None:
    """At run time the table is ignored with a single warning; it is never overwritten."""
    tuned.parent.mkdir()
    tuned.write_text(content, encoding="latin-1")
    for call in (lambda: tuning_tables.read(tuned), lambda: tuning_tables.merge(tuned, "A", {"k": ENTRY})):
        with pytest.raises(ArgumentError, match=r"tuned\.json .*: remove it and run `widekernel tune` again, or set"):
            call()
    assert tuned.read_text(encoding="latin-1") == content
    with pytest.warns(RuntimeWarning, match="Until then it is ignored"):
        assert TRITON.describe(PROBLEM).endswith("estimated, not measured")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TRITON.describe(PROBLEM).endswith("estimated, not measured")


def test_tables_of_version_0_4_0_are_read(tuned: Path) -> None:
    """There `transposed` was called `turned`."""
    sizes = {"rows": 1, "columns": 16, "row_blocks": 16, "images": 2, "depth": 16}
    config = {"method": "toeplitz", "warps": 4, "stages": 3, **sizes, "turned": 1}
    tuned.parent.mkdir()
    tuned.write_text(json.dumps({"format": 1, "gpus": {"A": {"k": {"config": config, "us": 1.0, "pytorch_us": None}}}}))
    entry = tuning_tables.read(tuned)["A"]["k"]
    assert tuning_tables.entry_config(entry) == Toeplitz(4, 3, **sizes, transposed=1)


def details() -> str:
    return ops.explain(X, [KERNEL], backend="triton")[0].details


def test_the_table_of_this_machine_is_used(tuned: Path) -> None:
    """It is used without a restart, even if it was written a moment ago."""
    assert "estimated" in details()
    tuning_tables.merge(tuning_tables.SHIPPED, machine.chip().name, {tuning_tables.table_key(PROBLEM): ENTRY})
    assert details() == f"{CONFIG}; shipped table"
    other = DirectNchw(4, 1, planes=8, pixels=64)
    for config in (CONFIG, other, CONFIG):
        tuning_tables.merge(tuned, name(), {tuning_tables.table_key(PROBLEM): ENTRY | {"config": config.to_entry()}})
        assert details() == f"{config}; tuned on this machine"
    assert TRITON.prepare(PROBLEM).config == CONFIG
    tuned.unlink()
    assert "shipped" in details()


def test_entries_for_others_are_not_used(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cannot = {"config": Flat(4, 1, pixels=16, images=16).to_entry(), "us": 1.0, "pytorch_us": 2.0}
    tuning_tables.merge(tuned, "another GPU", {tuning_tables.table_key(PROBLEM): ENTRY})
    tuning_tables.merge(tuned, name(), {"another problem": ENTRY, tuning_tables.table_key(PROBLEM): cannot})
    assert "estimated" in details()
    tuning_tables.merge(tuned, name(), {tuning_tables.table_key(PROBLEM): ENTRY})
    assert "tuned" in details()
    monkeypatch.setenv(tuning_tables.VARIABLE, "0")
    assert "estimated" in details()


@pytest.mark.parametrize(("us", "is_left"), [(10.0, False), (21.0, False), (21.1, True), (None, False)])
def test_problems_that_pytorch_computes_faster_are_left_to_it(us: float | None, is_left: bool, tuned: Path) -> None:
    tuning_tables.merge(tuned, name(), {tuning_tables.table_key(PROBLEM): ENTRY | {"us": us}})
    assert triton.planned(PROBLEM).better_in_pytorch == (
        "PyTorch takes 20 µs where this backend takes 21 µs (measured)" if is_left else ""
    )
    assert TRITON.can_run(PROBLEM)
