"""A single job: compute a problem on the GPU, compare it with float64, and return a row."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from benchmarks.gpu_session.problems import Job
from torch import Tensor

from widekernel.errors import in_short
from widekernel.ops.gpu.baselines import Inputs, compared_outputs, exact_outputs, fill_free_memory_with_nan, kernel_call
from widekernel.ops.gpu.kernel_configs import Chip
from widekernel.ops.gpu.launch import PreparedSum
from widekernel.ops.gpu.tuning import TF32_TOLERANCE, TOLERANCE
from widekernel.ops.problem import DEPTHWISE_SUM
from widekernel.ops.reference import relative_error

COLUMNS = (
    "layer",
    "dtype",
    "pass",
    "layout",
    "shape",
    "kernels",
    "config",
    "in_use",
    "error",
    "limit",
    "seconds",
    "verdict",
)
RIGHT = "right"


def row_of(job: Job) -> dict[str, Any]:
    """Return the fields of a row that are known before the job runs."""
    problem = job.problem
    return {
        "layer": job.layer,
        "dtype": job.kind,
        "pass": job.direction,
        "layout": "NHWC" if problem.channels_last else "NCHW",
        "shape": "x".join(map(str, problem.shape)),
        "kernels": "+".join(
            f"{kh}x{kw}" + (f"*{dilation}" if dilation != 1 else "")
            for (kh, kw), dilation in zip(problem.kernels, problem.dilations)
        ),
        "config": str(job.config),
        "in_use": int(job.chosen),
        "limit": TF32_TOLERANCE if problem.tf32 else TOLERANCE[problem.dtype],
    }


@torch.no_grad()
def run(job: Job, device: torch.device, chip: Chip) -> dict[str, Any]:
    """Compute and compare; return the row. Its seconds include compiling, and an error becomes its verdict."""
    row, started = row_of(job), time.perf_counter()
    try:
        error = _error(job, device, chip)
        row["error"] = error
        # Written so that NaN is wrong as well.
        row["verdict"] = RIGHT if error <= row["limit"] else "WRONG: differs from float64 by more than the limit"
    except Exception as raised:
        row["verdict"] = f"FAILED: {in_short(raised)}"
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def _error(job: Job, device: torch.device, chip: Chip) -> float:
    problem = job.problem
    inputs = Inputs.random(problem, device)
    wanted = exact_outputs(problem, inputs)
    call = kernel_call(problem, job.config, chip, inputs.with_compared_gradients())
    fill_free_memory_with_nan(problem, device)
    errors = [relative_error(y, e) for y, e in zip(compared_outputs(problem, call()), wanted, strict=True)]
    if problem.op == DEPTHWISE_SUM:
        errors.append(_epilogue_error(job, chip, inputs, wanted[0]))
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _epilogue_error(job: Job, chip: Chip, inputs: Inputs, wanted: Tensor) -> float:
    """Return the error with a scale, a bias and a ReLU, which are applied before the result is stored."""
    channels, like = job.problem.shape[1], inputs.xs[0]
    scale = torch.linspace(0.5, 1.5, channels, dtype=torch.float32).to(like.device)
    bias = torch.linspace(-1, 1, channels, dtype=torch.float32).to(like.device)
    prepared = PreparedSum(job.problem, job.config, chip)
    got = prepared(like, inputs.kernels, job.problem.anchors, bias, scale, True)
    affine = scale.double().view(-1, 1, 1) * wanted + bias.double().view(-1, 1, 1)
    return relative_error(compared_outputs(job.problem, got)[0], affine.relu())
