"""The guard itself, which finds planted faults in test kernels and in those of the library, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.ops.gpu.guard import AccessError, Guard, guarded
from widekernel.ops.gpu.interpreter import is_interpreted
from widekernel.ops.gpu.kernel_configs import Chip, DirectNhwcGrad, Flat, FlatGrad, KernelConfig, ToeplitzGrad
from widekernel.ops.gpu.launch import PreparedSum, PreparedWeightGrad
from widekernel.ops.problem import Problem

pytestmark = pytest.mark.interpreted

BLOCK = 8
CHIP = Chip((9, 0), 1, 227 * 1024)


@triton.jit
def _copied(x, y, first, read, step, written, stored, BLOCK: tl.constexpr):
    """Copy blocks: `read` and `written` are offsets, `step` separates programs, `stored` is the number of elements."""
    i = first + tl.program_id(0) * step + tl.arange(0, BLOCK)
    values = tl.load(x + read + i)
    tl.store(y + written + i, values, mask=i < stored)


@triton.jit
def _folded(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 2, tl.load(x + i))


@triton.jit
def _in_place(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) + 1.0)


@triton.jit
def _added(x, y):
    tl.atomic_add(y, tl.load(x))


def copy(x: Tensor, y: Tensor, read: int = 0, step: int = BLOCK, written: int = 0, stored: int = 2 * BLOCK) -> None:
    _copied[(2,)](x, y, 0, read, step, written, stored, BLOCK=BLOCK)


def pair() -> tuple[Tensor, Tensor]:
    """Return two tensors that are adjacent in memory."""
    both = torch.randn(4 * BLOCK)
    return both[: 2 * BLOCK], both[2 * BLOCK :]


def test_correct_kernels_pass(guard: Guard) -> None:
    x, y = pair()
    copy(x, y)
    assert torch.equal(x, y) and guard.launches == 1
    # Masked addresses may be anywhere.
    copy(x, y[:BLOCK], stored=BLOCK)
    rows = torch.arange(4.0 * BLOCK).view(4, BLOCK)
    copy(rows[1:3], y)
    assert torch.equal(rows[1:3].flatten(), y)


FAULTS: dict[str, tuple[Callable[[Tensor, Tensor], None], str]] = {
    "load-before": (lambda x, y: copy(x, y, read=-1), "load outside"),
    "load-behind": (lambda x, y: copy(x, y, read=1), "load outside"),
    "load-of-another-tensor": (lambda x, y: copy(x, y, read=2 * BLOCK), "load outside"),
    "load-far-away": (lambda x, y: copy(x, y, read=2**31 - 1), "load outside"),
    "load-beside-a-view": (lambda x, y: copy(torch.randn(4, BLOCK)[::2], y), "load outside"),
    "store-before": (lambda x, y: copy(x, y, written=-1), "store outside"),
    "store-behind": (lambda x, y: copy(x, y, written=1), "store outside"),
    "store-into-another-tensor": (lambda x, y: copy(x, y, written=-2 * BLOCK), "store outside"),
    "store-beside-a-view": (lambda x, y: copy(x, torch.empty(4, BLOCK)[::2]), "store outside"),
    "never-stored": (lambda x, y: copy(x, y, stored=2 * BLOCK - 1), "1 numbers are never stored"),
    "stored-by-two-programs": (lambda x, y: copy(x, y, step=BLOCK - 1), "stored already"),
    "stored-twice-at-once": (lambda x, y: _folded[(1,)](x, y, BLOCK=BLOCK), "stored already"),
    "loaded-and-stored": (lambda x, y: _in_place[(1,)](x[:BLOCK], BLOCK=BLOCK), "loads from the tensor that it stores into"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(guard: Guard, fault: str) -> None:
    launch, says = FAULTS[fault]
    with pytest.raises(AccessError, match=says):
        launch(*pair())


def test_atomics_are_refused(guard: Guard) -> None:
    x, y = pair()
    with pytest.raises(Exception, match="supports no atomics"):
        _added[(1,)](x, y)


def test_uninitialized_memory_is_nan(guard: Guard) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(5, 3, dtype=dtype).isnan().all() and torch.ones(2, dtype=dtype).new_empty(7).isnan().all()


@pytest.mark.skipif(not is_interpreted(), reason="watches Triton's interpreter")
def test_everything_is_restored() -> None:
    from triton.runtime import interpreter

    def state() -> tuple:
        builder = interpreter.InterpreterBuilder
        parts = [vars(builder)[f"create_{name}"] for name in ("masked_load", "masked_store", "atomic_rmw", "atomic_cas")]
        modes = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        return (*parts, interpreter._implicit_cvt, vars(interpreter.GridExecutor)["__call__"], *modes)

    before = state()
    with guarded():
        assert not any(now is then for now, then in zip(state()[:6], before))
    assert state() == before
    with pytest.raises(AccessError), guarded():
        copy(*pair(), read=1)
    assert state() == before


@pytest.mark.parametrize(
    "config",
    [Flat(4, 1, 64, 16), FlatGrad(4, 2, 64, 16), ToeplitzGrad(4, 3, 2, 16, 16, 32), DirectNhwcGrad(4, 1, 4, 4)],
    ids=str,
)
def test_an_access_to_one_image_too_many_is_found(guard: Guard, config: KernelConfig) -> None:
    x = torch.randn(4, 2, 6, 5)[:3]
    kernels, anchors = [torch.randn(2, 1, 3, 3)], ((1, 1),)
    prepared: PreparedSum | PreparedWeightGrad
    if isinstance(config, Flat):
        prepared = PreparedSum(Problem.of_sum(x, kernels, anchors), config, CHIP)
        run: Callable[[], Tensor] = partial(prepared, x, kernels, anchors, None)
    else:
        prepared = PreparedWeightGrad(Problem.of_weight_grad(x, (3, 3), (1, 1)), config, CHIP)
        run = partial(prepared, x, x, (3, 3), (1, 1))
    assert not run().isnan().any()
    # The launch now passes a batch with one more image, which is in memory but not part of the tensor.
    prepared._launch.batch += 1
    with pytest.raises(AccessError, match="load outside"):
        run()
