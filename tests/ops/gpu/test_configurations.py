"""Every problem has configurations that fit, and tuning tables can store them; no kernel runs."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.backends import BRANCHES
from tests.ops.gpu.pretended_gpu import ALL, CHIPS, SUM, WEIGHT_GRAD, problem
from widekernel.errors import ArgumentError
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.gpu import config_choice, cost_model
from widekernel.ops.gpu.candidates import candidates
from widekernel.ops.gpu.kernel_configs import (
    CONFIG_TYPES,
    Chip,
    DirectNchw,
    DirectNhwc,
    DirectNhwcGrad,
    Flat,
    FlatGrad,
    KernelConfig,
    Toeplitz,
    ToeplitzGrad,
    config_from_entry,
)
from widekernel.ops.gpu.launch_geometry import itemsize
from widekernel.ops.problem import Problem

TRITON = TritonBackend()

pytestmark = pytest.mark.usefixtures("no_tables")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    op = draw(st.sampled_from(ALL))
    side, extent = st.integers(1, 75), st.integers(1, 130)
    kernels = draw(st.lists(st.tuples(side, side), min_size=1, max_size=1 if op == WEIGHT_GRAD else 4))
    anchors = [(draw(st.integers(0, kh - 1)), draw(st.integers(0, kw - 1))) for kh, kw in kernels]
    shape = draw(st.integers(1, 256)), draw(st.integers(1, 600)), draw(extent), draw(extent)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tf32 = dtype == torch.float32 and draw(st.booleans())
    last, gaps = draw(st.booleans()), st.sampled_from([1, 1, 1, 2, 3, 5, 40])
    dilations = tuple(draw(gaps) for _ in kernels)
    return Problem(op, "cuda", dtype, shape, tuple(kernels), tuple(anchors), last, None, tf32, dilations)


def shared_bytes(of: Problem, config: KernelConfig) -> int:
    """Return the bytes of shared memory for the blocks of a product and the accumulators that are gathered."""
    each = itemsize(of.dtype)
    if isinstance(config, Toeplitz):
        sides = config.rows * config.columns + config.images * config.row_blocks
        return sides * config.depth * config.stages * each
    if isinstance(config, Flat):
        return (config.pixels + 2 * config.images) * config.pixels * each
    if isinstance(config, FlatGrad):
        return max(2 * config.pixels * config.images * each, config.pixels**2 * 4)
    if isinstance(config, ToeplitzGrad):
        rows = config.kernel_rows * config.inputs
        return max((rows + config.outputs) * config.depth * config.stages * each, rows * config.outputs * 4)
    assert isinstance(config, (DirectNchw, DirectNhwc, DirectNhwcGrad)), "say what the blocks of this one take"
    return 0


def product_of(config: KernelConfig) -> tuple[int, int, int] | None:
    """Return M, N and K."""
    if isinstance(config, Toeplitz):
        return config.rows * config.columns, config.images * config.row_blocks, config.depth
    if isinstance(config, Flat):
        return config.pixels, config.images, config.pixels
    if isinstance(config, FlatGrad):
        return config.pixels, config.pixels, config.images
    if isinstance(config, ToeplitzGrad):
        return config.kernel_rows * config.inputs, config.outputs, config.depth
    return None


def check(of: Problem, chip: Chip) -> None:
    listed = config_choice.ranked_configs(of, chip)
    assert listed, f"no configuration for {of} on {chip.name}"
    assert len(set(listed)) == len(listed)
    costs = [cost_model.estimated_cycles(of, config, chip) for config in listed]
    assert costs == sorted(costs) and all(0 < each < math.inf for each in costs)
    for config in listed:
        assert shared_bytes(of, config) <= chip.shared_bytes
        # Fields with a default are switches.
        sizes = [field.name for field in fields(config) if field.default is MISSING and field.name != "stages"]
        numbers = [getattr(config, name) for name in sizes]
        assert all(number > 0 and number & (number - 1) == 0 for number in numbers), f"{config}: blocks are powers of two"
        product = product_of(config)
        assert product is None or min(product) >= 16, f"{config}: tensor cores multiply 16 by 16 at least"


@given(problems(), st.sampled_from(sorted(CHIPS)))
@settings(max_examples=75, deadline=None)
def test_every_problem_has_configurations_that_fit(of: Problem, name: str) -> None:
    check(of, CHIPS[name])


def zero_filled(of: Problem) -> Problem:
    """Return the problem of rectangles whose gaps are filled with zeros."""
    rects = list(zip(of.kernels, of.anchors, of.dilations))
    kernels = tuple(((kh - 1) * d + 1, (kw - 1) * d + 1) for (kh, kw), _, d in rects)
    return replace(of, kernels=kernels, anchors=tuple((row * d, column * d) for _, (row, column), d in rects), dilations=())


@given(problems(), st.sampled_from(sorted(CHIPS)))
@settings(max_examples=12, deadline=None)
def test_gaps_cost_no_more_than_zeros(of: Problem, name: str) -> None:
    chip = CHIPS[name]
    filled = zero_filled(of)
    shared = set(candidates(of, chip)) & set(candidates(filled, chip))
    if shared:
        cost, dense = (min(cost_model.estimated_cycles(each, config, chip) for config in shared) for each in (of, filled))
        assert cost <= dense * (1 + 1e-9)


def test_gaps_between_rows_are_free() -> None:
    """Three rows five apart cost about as much as three adjacent ones, and far less than eleven."""
    for op, config in {
        SUM: Toeplitz(4, 4, rows=1, columns=16, row_blocks=16, images=4, depth=32),
        WEIGHT_GRAD: ToeplitzGrad(4, 3, kernel_rows=1, inputs=32, outputs=32, depth=32),
    }.items():
        near = problem((3, 3), op=op, shape=(64, 160, 28, 28))
        apart = replace(near, dilations=(5,))
        costs = [cost_model.estimated_cycles(each, config, CHIPS["sm_90"]) for each in (near, apart, zero_filled(apart))]
        assert costs[1] < 1.4 * costs[0] and costs[1] < 0.6 * costs[2]


EXTENTS = [1, 2, 3, 4, 5, 8, 9, 16, 130]
FEW_EXTENTS = [1, 2, 5, 16, 130]


@pytest.mark.parametrize("extents", [FEW_EXTENTS, pytest.param(EXTENTS, marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("op", [SUM, BRANCHES, WEIGHT_GRAD])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (9, 9), (75, 75), (1, 75), (75, 1)], ids=lambda k: f"{k[0]}x{k[1]}")
def test_images_of_a_few_rows_or_columns(kernel: tuple[int, int], op: str, channels_last: bool, extents: list[int]) -> None:
    for height in extents:
        for width in extents if height < 130 else extents[:-1]:
            of = problem(kernel, op=op, shape=(2, 3, height, width), channels_last=channels_last)
            for name in ("sm_86", "sm_90"):
                assert config_choice.ranked_configs(of, CHIPS[name]), f"no configuration for {of} on {name}"


@given(problems(), st.sampled_from(sorted(CHIPS)), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_the_ranking_depends_on_nothing_but_the_problem(of: Problem, name: str, random: Any) -> None:
    chip = CHIPS[name]
    first = config_choice.ranked_configs(of, chip)
    found = list(first)
    random.shuffle(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_choice, "candidates", lambda *args: found)
        assert config_choice.ranked_configs(of, chip) == first


# ---- Entries of tables


EVERY_KIND = [kind(**{field.name: 16 << i for i, field in enumerate(fields(kind))}) for kind in CONFIG_TYPES.values()]


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
def test_entries_restore_their_configurations(config: KernelConfig) -> None:
    entry = config.to_entry()
    assert config_from_entry(entry) == config
    assert config_from_entry(json.loads(json.dumps(entry))) == config
    assert entry["method"] == config.method
    assert str(config).startswith(f"{config.method} (warps {config.warps}, stages {config.stages}, ")


FLAT = Flat(4, 2, pixels=64, images=16).to_entry()
BAD = {
    "no-method": ({name: number for name, number in FLAT.items() if name != "method"}, "unknown method None"),
    "unknown-method": (
        FLAT | {"method": "winograd"},
        "unknown method 'winograd': it must be one of toeplitz, flat",
    ),
    "missing": (
        {name: number for name, number in FLAT.items() if name != "images"},
        "flat has .*whole numbers images",
    ),
    "one-more": (FLAT | {"depth": 16}, "flat has .*'depth': 16.*: it needs .* images, pixels, stages, warps"),
    "zero": (FLAT | {"images": 0}, "positive whole numbers"),
    "negative": (FLAT | {"warps": -4}, "positive whole numbers"),
    "half": (FLAT | {"pixels": 64.5}, "positive whole numbers"),
    "words": (FLAT | {"pixels": "64"}, "positive whole numbers"),
    "nothing": (FLAT | {"pixels": None}, "positive whole numbers"),
    "transposed-back": (EVERY_KIND[0].to_entry() | {"transposed": -1}, "positive whole numbers"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_entries_are_refused(bad: str) -> None:
    entry, message = BAD[bad]
    with pytest.raises(ArgumentError, match=message):
        config_from_entry(entry)
