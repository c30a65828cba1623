"""Random streams that are a function of (seed, purpose, position) and of nothing else.

Augmentation in timm and torchvision draws from the global generators of python, numpy and torch. Binding those
generators for the duration of one sample or batch makes the draw independent of worker count, of the order in which
workers run and of whether the run was interrupted before.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*keys: int) -> int:
    """A 63-bit seed that depends on every key; keys are non-negative integers."""
    low, high = np.random.SeedSequence([int(key) for key in keys]).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) & (2**63 - 1)


@contextmanager
def scoped_seed(*keys: int) -> Iterator[None]:
    """Within the block the global CPU generators follow `keys`; afterwards they are as they were before."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would touch the CUDA generators as well
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
