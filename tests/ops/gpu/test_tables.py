"""Tables of configurations: their keys, their files, and what the plan makes of them."""

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
from widekernel.ops.gpu import machine, tables
from widekernel.ops.gpu.configs import Flat, Planes
from widekernel.ops.problem import DEPTHWISE_BRANCHES, DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, DIRECT, Problem

TRITON = TritonBackend()

X, KERNEL = torch.zeros(2, 3, 8, 8).to(DEVICE), torch.zeros(3, 1, 5, 5).to(DEVICE)
PROBLEM = Problem.of_sum(X, [KERNEL], [(2, 2)])
# Not the cheapest one by the estimate.
CONFIG = Flat(4, 2, pixels=64, images=16)
ENTRY = {"config": CONFIG.entry(), "us": 10.0, "pytorch_us": 20.0}


@pytest.fixture(autouse=True)
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the file of this machine's table, which does not exist; neither does the shipped one."""
    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv(tables.VARIABLE, str(path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped.json")
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
    ],
)
def test_keys_stay_as_they_are(problem: Problem, key: str) -> None:
    """Tables on the machines of users have them."""
    assert tables.key_of(problem) == key


def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tables.VARIABLE, "0")
    assert tables.tuned_file() is None
    monkeypatch.delenv(tables.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.tuned_file() == tmp_path / "widekernel" / "tuned.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tables.tuned_file() == tmp_path / "home" / ".cache" / "widekernel" / "tuned.json"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert tables.tuned_file() is None


def test_merging_keeps_what_is_there(tuned: Path) -> None:
    tables.merge(tuned, "A", {"k": ENTRY})
    tables.merge(tuned, "A", {"l": ENTRY})
    tables.merge(tuned, "B", {"k": ENTRY})
    tables.merge(tuned, "A", {"k": ENTRY | {"us": 1}})
    assert tables.read(tuned) == {"A": {"k": ENTRY | {"us": 1}, "l": ENTRY}, "B": {"k": ENTRY}}
    assert [path.name for path in tuned.parent.iterdir()] == ["tuned.json"]


def test_merging_follows_links(tuned: Path, tmp_path: Path) -> None:
    tuned.parent.mkdir()
    tuned.symlink_to(tmp_path / "elsewhere.json")
    tables.merge(tuned, "A", {"k": ENTRY})
    assert tuned.is_symlink() and "A" in tables.read(tmp_path / "elsewhere.json")


def test_many_at_once(tuned: Path) -> None:
    """Nobody's entries are lost, and at every moment there is a whole table."""
    tables.merge(tuned, "A", {"first": ENTRY})

    def merge(number: int) -> None:
        for i in range(5):
            tables.merge(tuned, "A", {f"{number} {i}": ENTRY})

    threads = [threading.Thread(target=merge, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert "first" in tables.read(tuned)["A"]
    assert len(tables.read(tuned)["A"]) == 21


def test_breaking_off_leaves_the_old_table(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.merge(tuned, "A", {"k": ENTRY})

    def no_room(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(OSError, match="No space"):
        tables.merge(tuned, "A", {"l": ENTRY})
    assert tables.read(tuned) == {"A": {"k": ENTRY}} and len(list(tuned.parent.iterdir())) == 1


SPOILT = {
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
            {"config": {**CONFIG.entry(), "images": -1}},
            {"config": CONFIG.entry(), "us": "fast"},
            {"config": CONFIG.entry(), "us": True},
            {"config": CONFIG.entry(), "pytorch_us": 0},
            {"config": CONFIG.entry(), "pytorch_us": float("nan")},
        )
    },
}


@pytest.mark.parametrize("content", SPOILT.values(), ids=SPOILT)
def test_spoilt_tables(content: str, tuned: Path) -> None:
    """At run time one is ignored with one warning; nobody writes over it."""
    tuned.parent.mkdir()
    tuned.write_text(content, encoding="latin-1")
    for call in (lambda: tables.read(tuned), lambda: tables.merge(tuned, "A", {"k": ENTRY})):
        with pytest.raises(ArgumentError, match=r"tuned\.json .*: remove it and run `widekernel tune` again, or set"):
            call()
    assert tuned.read_text(encoding="latin-1") == content
    with pytest.warns(RuntimeWarning, match="Until then it is ignored"):
        assert TRITON.describe(PROBLEM).endswith("estimated, not measured")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TRITON.describe(PROBLEM).endswith("estimated, not measured")


def details() -> str:
    return ops.explain(X, [KERNEL], backend="triton")[0].details


def test_the_plan_uses_the_table_of_this_machine(tuned: Path) -> None:
    """Without a restart: also what was written a moment ago."""
    assert "estimated" in details()
    tables.merge(tables.SHIPPED, machine.chip().name, {tables.key_of(PROBLEM): ENTRY})
    assert details() == f"{CONFIG}; shipped table"
    other = Planes(4, 1, planes=8, pixels=64)
    for config in (CONFIG, other, CONFIG):
        tables.merge(tuned, name(), {tables.key_of(PROBLEM): ENTRY | {"config": config.entry()}})
        assert details() == f"{config}; tuned on this machine"
    assert TRITON.prepare(PROBLEM).config == CONFIG
    tuned.unlink()
    assert "shipped" in details()


def test_entries_for_others_are_not_used(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cannot = {"config": Flat(4, 1, pixels=16, images=16).entry(), "us": 1.0, "pytorch_us": 2.0}
    tables.merge(tuned, "another GPU", {tables.key_of(PROBLEM): ENTRY})
    tables.merge(tuned, name(), {"another problem": ENTRY, tables.key_of(PROBLEM): cannot})
    assert "estimated" in details()
    tables.merge(tuned, name(), {tables.key_of(PROBLEM): ENTRY})
    assert "tuned" in details()
    monkeypatch.setenv(tables.VARIABLE, "0")
    assert "estimated" in details()


@pytest.mark.parametrize(("us", "is_left"), [(10.0, False), (21.0, False), (21.1, True), (None, False)])
def test_what_pytorch_does_faster_is_left_to_it(us: float | None, is_left: bool, tuned: Path) -> None:
    tables.merge(tuned, name(), {tables.key_of(PROBLEM): ENTRY | {"us": us}})
    assert triton.planned(PROBLEM).better_in_pytorch == (
        "PyTorch takes 20 µs where this backend takes 21 µs (measured)" if is_left else ""
    )
    assert TRITON.can_run(PROBLEM)
