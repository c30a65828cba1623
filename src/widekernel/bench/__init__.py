"""Speed of the operators and of networks on a CPU or a CUDA device, beside PyTorch and inference engines."""

from widekernel.bench.cases import PASSES, SETS, Case, choose, parse_case
from widekernel.bench.checking import check_operator
from widekernel.bench.errors import BenchmarkError
from widekernel.bench.machine import Machine, measure_machine, using_threads
from widekernel.bench.operators import Row, measure_case

__all__ = [
    "PASSES",
    "SETS",
    "BenchmarkError",
    "Case",
    "Machine",
    "Row",
    "check_operator",
    "choose",
    "measure_case",
    "measure_machine",
    "parse_case",
    "using_threads",
]
