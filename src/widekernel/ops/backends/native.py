"""The backend of our own kernels for CPUs: float32, bfloat16 and float16, any rectangle, both layouts."""

from __future__ import annotations

import math
from typing import final

import torch

from widekernel.ops.backends.base import Backend, Operator
from widekernel.ops.cpu import library
from widekernel.ops.cpu.costs import Costs, costs_of
from widekernel.ops.cpu.partial import PreparedPartialSum
from widekernel.ops.cpu.plan import BRANCHES, plan, reason_for_pytorch
from widekernel.ops.cpu.prepared import DTYPES, PACKED, PreparedSum, PreparedWeightGrad
from widekernel.ops.empty import EMPTY
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Problem,
)


def _costs() -> Costs:
    loaded = library.load()
    return costs_of(loaded.isa, loaded.processor)


@final
class NativeBackend(Backend):
    """The kernels of the native library."""

    name = "native"
    operators = frozenset({DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES})
    calls_pytorch = False
    computes_dilated = True

    def reasons_against(self, problem: Problem) -> list[str]:
        """List why the kernels cannot compute the problem, or why PyTorch's are better; empty if neither applies."""
        obstacles = self._obstacles(problem)
        if obstacles:
            return obstacles
        loaded = library.load()
        slower = reason_for_pytorch(problem, loaded.processor, loaded.isa)
        return [slower] if slower else []

    def can_run(self, problem: Problem) -> bool:
        """Return whether the kernels can compute the problem, even if PyTorch's are faster."""
        return not self._obstacles(problem)

    def prepare(self, problem: Problem) -> Operator:
        """Choose passes, algorithms and the number of threads."""
        if 0 in problem.shape:
            return EMPTY[problem.op]
        prepared = self._prepared(problem)
        if isinstance(prepared, PreparedWeightGrad):
            return prepared
        operators: dict[str, Operator] = {
            DEPTHWISE_SUM: prepared,
            DEPTHWISE_BRANCHES: prepared.branches,
            DEPTHWISE_SUM_OF_BRANCHES: prepared.sum_of_branches,
        }
        return operators[problem.op]

    def prepare_partial(self, problem: Problem) -> PreparedPartialSum:
        """Prepare the calls that compute a sum of some channels of a larger image; the problem is that of these channels."""
        loaded = library.load()
        return PreparedPartialSum(problem, plan(problem, torch.get_num_threads(), loaded.lanes, _costs()))

    def describe(self, problem: Problem) -> str:
        """Describe the passes, how the image passes through memory unless it is packed, threads and working memory."""
        if 0 in problem.shape:
            return "nothing to compute"
        prepared = self._prepared(problem)
        own, shared = prepared.workspace()
        count = prepared.plan.threads
        threads = f"{count} thread{'s' if count > 1 else ''}"
        memory = f"working memory {_size(own)} a thread and {_size(shared)} shared"
        isa = library.load().isa
        form = prepared.form() if isinstance(prepared, PreparedSum) else PACKED
        how = f"{prepared.plan}" if form == PACKED else f"{prepared.plan}, {form}"
        return f"{how}; {isa}, cost model of {_costs().measured_with}, {threads}, {memory}"

    def _prepared(self, problem: Problem) -> PreparedSum | PreparedWeightGrad:
        loaded = library.load()
        chosen = plan(problem, torch.get_num_threads(), loaded.lanes, _costs())
        return PreparedWeightGrad(problem, chosen) if problem.op == DEPTHWISE_WEIGHT_GRAD else PreparedSum(problem, chosen)

    def _obstacles(self, problem: Problem) -> list[str]:
        obstacles = []
        if problem.device != "cpu":
            obstacles.append(f"it runs on a CPU, not on {problem.device}")
        if problem.dtype not in DTYPES:
            obstacles.append(f"it computes float32, bfloat16 and float16, not {problem.dtype}")
        if len(problem.kernels) > library.MOST_RECTS:
            obstacles.append(f"it adds up at most {library.MOST_RECTS} kernels, not {len(problem.kernels)}")
        if problem.op in BRANCHES and len(problem.kernels) > library.MOST_PASSES:
            obstacles.append(f"it computes at most {library.MOST_PASSES} branches at once, not {len(problem.kernels)}")
        if not obstacles and library.load().reason is not None:
            library.warn_once_if_missing()
            obstacles.append(str(library.load().reason))
        return obstacles


def _size(count: int) -> str:
    """Return a number of bytes in KiB, rounded up, or from 1 MiB on in MiB."""
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{math.ceil(count / 2**10)} KiB"
