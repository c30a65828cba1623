"""Side-by-side timings of operators and networks on a CPU or a CUDA device: ours, PyTorch's and inference engines."""

from widekernel.bench.cases import PASSES, SETS, Case, choose, parse_case
from widekernel.bench.checking import check_operator
from widekernel.bench.errors import BenchmarkError
from widekernel.bench.machine import Machine, measure_machine, using_threads
from widekernel.bench.memory import keeping_memory
from widekernel.bench.networks import NetworkPlan, measure_networks
from widekernel.bench.operators import OperatorPlan, measure_operators
from widekernel.bench.platforms import Platform, cpu_platform, cuda_platform
from widekernel.bench.time_budget import TimeBudget

__all__ = [
    "PASSES",
    "SETS",
    "BenchmarkError",
    "Case",
    "Machine",
    "NetworkPlan",
    "OperatorPlan",
    "Platform",
    "TimeBudget",
    "check_operator",
    "choose",
    "cpu_platform",
    "cuda_platform",
    "keeping_memory",
    "measure_machine",
    "measure_networks",
    "measure_operators",
    "parse_case",
    "using_threads",
]
