"""Random numbers of the training step, as a function of (seed, step, position).

Dropout and drop path draw from PyTorch's global generators. They are seeded before every forward pass, so no training state
needs to contain the state of a generator, and a resumed run draws what the undisturbed one would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from widekernel.data import seeding
from widekernel.data.seeding import STEP_STREAM, derive_seed, seed_generators
from widekernel.engine.task import Position


def seed_forward(position: Position) -> None:
    """Seed the generators of Python, NumPy and PyTorch, those of CUDA devices in use included, for one forward pass."""
    seed = derive_seed(STEP_STREAM, position.seed, position.step, position.first)
    seed_generators(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restore the state of all global generators, those of CUDA devices in use included, after the block."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    with seeding.generators_restored():
        try:
            yield
        finally:
            if devices:
                torch.cuda.set_rng_state_all(devices)
