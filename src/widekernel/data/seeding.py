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
SHUFFLE_STREAM, AUGMENT_STREAM, MIX_STREAM = 1, 2, 3


def derive_seed(*keys: int) -> int:
    """Return a 63-bit seed that depends on every key; keys are non-negative integers."""
    low, high = np.random.SeedSequence([int(key) for key in keys]).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) & (2**63 - 1)


@contextmanager
def scoped_seed(*keys: int) -> Iterator[None]:
    """Seed the global CPU generators with `keys` within the block, and restore their state afterwards."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also seed the CUDA generators.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
