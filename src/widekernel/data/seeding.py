"""Random streams that depend only on (seed, purpose, position).

Augmentation in timm and torchvision draws from the global generators of Python, NumPy and PyTorch. Seeding those
generators for one sample or batch makes its draws independent of the number of workers, of the order in which workers
run and of earlier interruptions of the run.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# First keys of the random streams: each purpose has its own stream.
SHUFFLE_STREAM, AUGMENT_STREAM, MIX_STREAM, MODEL_STREAM, STEP_STREAM, SAMPLING_STREAM = 1, 2, 3, 4, 5, 6


def derive_seed(*keys: int) -> int:
    """Return a 63-bit seed that depends on every key; keys are non-negative integers."""
    low, high = np.random.SeedSequence([int(key) for key in keys]).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) & (2**63 - 1)


def seed_generators(seed: int) -> None:
    """Seed the global CPU generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also seed the CUDA generators; while CUDA is unused, it formats a stack trace in each call.
    torch.default_generator.manual_seed(seed)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restore the state of the global CPU generators after the block."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


@contextmanager
def scoped_seed(*keys: int) -> Iterator[None]:
    """Seed the global CPU generators with `keys` within the block, and restore their state afterwards."""
    with generators_restored():
        seed_generators(derive_seed(*keys))
        yield
