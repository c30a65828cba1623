"""Compile launches for GPUs that this machine does not have, and extract facts that tests can assert.

Triton needs no GPU to compile. The launching code runs on meta tensors, with every kernel replaced by a recorder that
compiles each call. That happens in separate processes: without a GPU the tests run in Triton's interpreter, which replaces
the compiler when Triton is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from widekernel.ops.gpu.kernel_configs import Chip, KernelConfig, config_from_entry
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Problem,
)

ROOT = Path(__file__).resolve().parents[3]
CHIPS = {
    "sm_80": Chip((8, 0), 108, 163 * 1024),
    "sm_90": Chip((9, 0), 132, 227 * 1024),
    "sm_100": Chip((10, 0), 148, 227 * 1024),
}
"""The GPUs in the shipped table."""
OTHERS = {
    "sm_86": Chip((8, 6), 82, 99 * 1024),
    "sm_89": Chip((8, 9), 128, 99 * 1024),
    "sm_120": Chip((12, 0), 170, 99 * 1024),
}
"""GPUs whose configurations are all estimated: RTX 30, RTX 40 and RTX 50, with less shared memory."""
ALL_CHIPS = CHIPS | OTHERS
TENSOR_CORES = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")


@dataclass(frozen=True)
class Job:
    """A problem, its configuration, and the GPU to compile for."""

    problem: Problem
    config: KernelConfig
    chip: str

    def packed(self) -> dict[str, Any]:
        problem = asdict(self.problem) | {"dtype": str(self.problem.dtype).removeprefix("torch.")}
        return {"problem": problem, "config": self.config.to_entry(), "chip": self.chip}

    @staticmethod
    def unpacked(packed: dict[str, Any]) -> Job:
        fields = dict(packed["problem"])
        fields["dtype"] = getattr(torch, fields["dtype"])
        for name in ("shape", "kernels", "anchors", "dilations"):
            fields[name] = tuple(tuple(v) if isinstance(v, list) else v for v in fields[name])
        return Job(Problem(**fields), config_from_entry(packed["config"]), packed["chip"])

    def __str__(self) -> str:
        return f"{self.chip} {self.problem.dtype} {self.problem} {self.config}"


@dataclass(frozen=True)
class Compiled:
    """Facts about a compiled kernel.

    Attributes:
        kernel: its name.
        target: the architecture, such as sm_90a.
        shared: bytes of shared memory per program.
        registers: per thread.
        stack: bytes of local memory per thread, used for what does not fit into registers.
        products: number of tensor-core instructions, by name.
        copies: number of asynchronous copies into shared memory, by their bytes.
    """

    kernel: str
    target: str
    shared: int
    registers: int
    stack: int
    products: dict[str, int]
    copies: dict[str, int]


MANY = 100
"""Number of jobs from which a second process pays: it takes seconds to start."""


def compile_all(jobs: Sequence[Job]) -> list[list[Compiled]]:
    """Compile the kernels that each job launches, in other processes."""
    processes = 2 if len(jobs) >= MANY else 1
    shares = [list(range(start, len(jobs), processes)) for start in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(lambda share: _in_a_process([jobs[i] for i in share]), shares))
    results: list[list[Compiled]] = [[] for _ in jobs]
    for share, part in zip(shares, parts):
        for i, compiled in zip(share, part):
            results[i] = compiled
    return results


def _in_a_process(jobs: Sequence[Job]) -> list[list[Compiled]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.gpu.compiling"]
    text = json.dumps([job.packed() for job in jobs])
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[Compiled(**fields) for fields in compiled] for compiled in json.loads(done.stdout)]


class Recorder:
    """Replaces a kernel in its module: compiles every launch and counts instructions."""

    def __init__(self, kernel: Any, chip: Chip, found: list[Compiled]) -> None:
        self.kernel, self.chip, self.found = kernel, chip, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert 0 < grid[0] < 2**31 and all(0 < size < 2**16 for size in grid[1:]), f"no GPU takes the grid {grid}"
        return self._launch

    def _launch(self, *values: Any, num_warps: int, num_stages: int = 3, enable_fp_fusion: bool, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        given = dict(zip(names, values)) | constants
        assert set(given) == set(names), set(given) ^ set(names)
        signature, constexprs, hints = {}, {}, {}
        free = self.kernel.do_not_specialize or ()
        for i, name in enumerate(names):
            value = given[name]
            if name in constants or value is None:
                signature[name] = "constexpr"
                constexprs[(i,)] = value
            elif isinstance(value, tuple):
                signature[name] = tuple(_kind(part) for part in value)
                hints |= {(i, j): _ALIGNED for j, part in enumerate(value) if _aligned(part)}
            else:
                signature[name] = _kind(value)
                if name not in free and _aligned(value):
                    hints[(i,)] = _ALIGNED
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constexprs, attrs=hints)
        major, minor = self.chip.capability
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
        compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
        self.found.append(_described(self.kernel.__name__, compiled))


_ALIGNED = [["tt.divisibility", 16]]


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _aligned(value: Any) -> bool:
    """Return whether Triton would know that the value is a multiple of 16; new tensors begin at such addresses."""
    return isinstance(value, Tensor) or value % 16 == 0


def _described(name: str, compiled: Any) -> Compiled:
    ptx = compiled.asm["ptx"]
    copies: dict[str, int] = {}
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)", ptx):
        copies[str(int(size, 0))] = copies.get(str(int(size, 0)), 0) + 1
    products: dict[str, int] = {}
    for instruction in TENSOR_CORES.findall(ptx):
        products[instruction] = products.get(instruction, 0) + 1
    registers, stack = _resources(compiled.asm["cubin"])
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    return Compiled(name, target[1], compiled.metadata.shared, registers, stack, products, copies)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of local memory, as reported by the disassembler that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers is not None and stack is not None
    return int(registers[1]), int(stack[1])


def compile_job(job: Job) -> list[Compiled]:
    """Run the launching code of a job on meta tensors; return the compiled kernels."""
    from widekernel.ops.gpu import launch
    from widekernel.ops.gpu.kernels import direct, flat, toeplitz, weight_grad

    chip, found = ALL_CHIPS[job.chip], []
    replaced = []
    for module in (direct, flat, toeplitz, weight_grad):
        for name, value in list(vars(module).items()):
            # Only kernels that are launched; the functions that they call stay unchanged.
            if type(value).__name__ == "JITFunction" and not name.startswith("_") and value.__module__ == module.__name__:
                replaced.append((module, name, value))
                setattr(module, name, Recorder(value, chip, found))
    try:
        _launch(job, launch)
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
    return found


def _launch(job: Job, launch: Any) -> None:
    problem, chip = job.problem, ALL_CHIPS[job.chip]
    x = torch.empty(problem.shape, dtype=problem.dtype, device="meta")
    if problem.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    kernels = [torch.empty(x.shape[1], 1, *size, dtype=x.dtype, device="meta") for size in problem.kernels]
    if problem.op == DEPTHWISE_WEIGHT_GRAD:
        launch.PreparedWeightGrad(problem, job.config, chip)(x, x, problem.kernels[0], problem.anchors[0])
        return
    prepared = launch.PreparedSum(problem, job.config, chip)
    if problem.op == DEPTHWISE_SUM:
        prepared(x, kernels, problem.anchors, torch.empty(x.shape[1], dtype=x.dtype, device="meta"))
    elif problem.op == DEPTHWISE_BRANCHES:
        prepared.branches(x, kernels, problem.anchors)
    else:
        assert problem.op == DEPTHWISE_SUM_OF_BRANCHES
        prepared.sum_of_branches([x] * len(kernels), kernels, problem.anchors)


if __name__ == "__main__":
    work = [Job.unpacked(packed) for packed in json.load(sys.stdin)]
    sys.stdout.write(json.dumps([[asdict(compiled) for compiled in compile_job(job)] for job in work]))
