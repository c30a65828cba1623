"""Random numbers of the training step, as a function of (seed, step, position).

Dropout and drop path draw from PyTorch's global generators. They are seeded before every forward pass, so no training state
needs to contain the state of a generator, and a resumed run draws what the undisturbed one would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from widekernel.data.seeding import derive_seed
from widekernel.engine.task import Position

MODEL_STREAM, STEP_STREAM = 4, 5
"""First keys of the streams that initialize the model, and that drive dropout and drop path."""


def seed_forward(position: Position) -> None:
    """Seed the generators of Python, NumPy and PyTorch, those of CUDA devices included, for one forward pass."""
    seed = derive_seed(STEP_STREAM, position.seed, position.step, position.first)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restore the state of all global generators after the block."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if devices:
            torch.cuda.set_rng_state_all(devices)
