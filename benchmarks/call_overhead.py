"""The overhead of a call of `ops.depthwise_sum`, measured on a problem so small that overhead dominates.

    python benchmarks/call_overhead.py
    python benchmarks/call_overhead.py --against ../other/.venv/bin/python

The problem is one image of 8 channels and 7x7 pixels in float32, with one 3x3 kernel, on one thread. Three things are timed
in turn, a burst of calls each, and medians over the rounds are printed:

* call: `ops.depthwise_sum(x, [kernel], [(1, 1)])` under `no_grad`, from Python to Python;
* kernel: the function of the native library, called through ctypes with arguments that are already converted: nothing is
  allocated, chosen or checked;
* training: forward and backward of the same call, in all three gradients.

The overhead is the difference of the first two. With `--against`, another Python's widekernel is measured in turn with this
one, so that both see the same load.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from widekernel import ops
from widekernel.ops.cpu import library

SHAPE, SIZE, ANCHOR = (1, 8, 7, 7), (3, 3), (1, 1)
BURST = {"call": 100, "kernel": 100, "training": 5}
"""Number of calls that are timed together: few, so that most bursts are not interrupted."""


def kernel_call(x: torch.Tensor, kernel: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """Return a function that calls the native library with converted arguments."""
    size = (*SIZE, *ANCHOR)
    passes = (library.Pass * 1)(library.Pass(*size, library.DIRECT, 1, 0, 0))
    rects = (library.Rect * 1)(library.Rect(None, *size, 1, 0))
    images = [(None, *tensor.stride()) for tensor in (x, y)]
    call = library.Sum(library.FLOAT32, 1, *SHAPE, *images, 1, 1, None, None, 1, 1, passes, rects)
    numbers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y))
    arguments = (ctypes.byref(call), *numbers, (library.Address * 1)(kernel.data_ptr()), None, None, 0)
    function = library.load().calls.wk_depthwise_sum_at
    # The objects that the arguments point to must live as long as the function that uses them.
    return lambda keep=(call, passes, rects, x, kernel, y): function(*arguments)


def bursts() -> dict[str, Callable[[], float]]:
    """Return functions that time one burst and return the seconds per call."""
    x, kernel = torch.randn(SHAPE), torch.randn(SHAPE[1], 1, *SIZE)
    kernels, anchors, y = [kernel], [ANCHOR], torch.empty(SHAPE)
    trained = [x.clone().requires_grad_(), kernel.clone().requires_grad_(), torch.zeros(SHAPE[1], requires_grad=True)]
    compute = kernel_call(x, kernel, y)
    compute()
    torch.testing.assert_close(y, ops.depthwise_sum(x, kernels, anchors, backend="reference"))

    def train() -> None:
        y = ops.depthwise_sum(trained[0], trained[1:2], anchors, trained[2])
        torch.autograd.grad(y, trained, y.detach())

    def call() -> None:
        ops.depthwise_sum(x, kernels, anchors)

    def burst(function: Callable[[], object], count: int) -> Callable[[], float]:
        def run() -> float:
            with torch.set_grad_enabled(function is train):
                begin = time.perf_counter()
                for _ in range(count):
                    function()
                return (time.perf_counter() - begin) / count

        return run

    functions = {"call": call, "kernel": compute, "training": train}
    return {name: burst(function, BURST[name]) for name, function in functions.items()}


def serve() -> None:
    """Time a burst for every name read from standard input."""
    torch.set_num_threads(1)
    timed = bursts()
    for line in sys.stdin:
        print(json.dumps(timed[line.strip()]()), flush=True)


class Server:
    """A process that times bursts of one installation."""

    def __init__(self, python: str) -> None:
        command = [python, __file__, "--serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def burst(self, name: str) -> float:
        """Time one burst, in microseconds per call."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return 1e6 * float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def rows(servers: dict[str, Server], rounds: int) -> Iterator[tuple[str, ...]]:
    """Time all installations in turn and return a row of medians for each."""
    times: dict[str, dict[str, list[float]]] = {label: {name: [] for name in BURST} for label in servers}
    for _ in range(rounds):
        for name in BURST:
            for label, server in servers.items():
                times[label][name].append(server.burst(name))
    for label, of in times.items():
        overhead = statistics.median(call - kernel for call, kernel in zip(of["call"], of["kernel"]))
        medians = [statistics.median(of[name]) for name in ("call", "kernel")]
        yield (label, *(f"{us:.2f}" for us in (*medians, overhead, statistics.median(of["training"]))))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000, help="bursts of each kind; the median counts")
    parser.add_argument("--against", help="another Python that has widekernel, to be measured in turn with this one")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    pythons = {"this": sys.executable} | ({"other": arguments.against} if arguments.against else {})
    servers = {label: Server(python) for label, python in pythons.items()}
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    print(f"{_processor()}; {versions}, {library.load().isa}, one thread")
    print("microseconds: installation, call, kernel, overhead (call - kernel), training (forward and backward)")
    for row in rows(servers, arguments.rounds):
        print("  ".join(f"{cell:>8}" for cell in row))
    for server in servers.values():
        server.close()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
