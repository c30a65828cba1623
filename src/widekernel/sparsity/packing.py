"""Bit-packed masks, for checkpoints and for the digests that processes compare."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into uint8 (ceil(numel / 8),) on the CPU.

    Elements are taken in logical order; the first one becomes the highest bit.
    """
    flat = mask.detach().reshape(-1).cpu()
    return torch.from_numpy(np.packbits(flat.numpy())).clone()


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack`: return the bool tensor of `shape`, on the CPU."""
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)).reshape(shape)


def digest(name: str, mask: Tensor) -> int:
    """Return a 64-bit digest of a mask and its name, as a signed integer."""
    content = hashlib.blake2b(name.encode(), digest_size=8)
    content.update(pack(mask).numpy().tobytes())
    return int.from_bytes(content.digest(), "big", signed=True)
