"""Global random generators: seeding at the start of a run, and their state in checkpoints."""

import random
from typing import Any, cast

import numpy as np
import torch

from widekernel.data.seeding import derive_seed

MODEL_STREAM = 4
"""First key of the stream that initializes the model and drives dropout and drop path."""


def seed_run(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy and PyTorch for a run; call it only at the entry point of a training process."""
    derived = derive_seed(MODEL_STREAM, seed, rank)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.manual_seed(derived)


def random_state() -> dict[str, Any]:
    """Return the state of all global generators as tensors, numbers and lists."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = cast(tuple, np.random.get_state(legacy=True))
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore all global generators to a state that `random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
