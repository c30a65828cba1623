"""Saving of checkpoints in our layout and in the official ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from widekernel.errors import CheckpointError
from widekernel.models.checkpoint.arguments import resolve_path, unwrap
from widekernel.models.layouts.conversion import to_official
from widekernel.models.layouts.nesting import nesting_of
from widekernel.tensor_files import described, write_weights


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    layout: Literal["native", "official"] = "native",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Save the weights of `model` atomically, and return the path.

    Weights are saved unchanged. A moving average is as sparse as the network only if `DynamicSparsity` manages it, too
    (`averages=`).

    Args:
        model: the network, or its `features_only` form.
        path: path of the file; it must end in `.safetensors` for layout "native", in `.pth` or `.pt` for "official".
        layout: "native" for our own names, "official" for those of the authors' code, which can then load the file.
        metadata: values that JSON can represent, to be stored in a safetensors file.

    Raises:
        ArgumentError: if `model` is not a network or `path` not a path.
        CheckpointError: if the suffix does not fit, the layout has no place for a weight, or the file cannot be written.
    """
    path = resolve_path(path)
    suffixes = {"native": (".safetensors",), "official": (".pth", ".pt")}
    if layout not in suffixes:
        raise CheckpointError(f"layout {layout!r} is unknown: it must be 'native' or 'official'")
    if path.suffix not in suffixes[layout]:
        raise CheckpointError(f"{path} must end in {' or '.join(suffixes[layout])} for layout {layout!r}")
    if layout == "official":
        if metadata:
            raise CheckpointError("the official layout has no place for metadata: save with layout='native'")
        state = {key: value.detach().cpu() for key, value in to_official(unwrap(model)).items()}
        whole = bool(nesting_of(unwrap(model)).official)  # in the container of OpenMMLab's libraries
        content = {"meta": {}, "state_dict": state} if whole else {"model": state}
        return write_weights(path, lambda file: torch.save(content, file))
    native = {key: value.detach().cpu() for key, value in unwrap(model).state_dict().items()}
    # safetensors cannot write views or tensors that share memory.
    native = {key: value.clone(memory_format=torch.contiguous_format) for key, value in native.items()}
    header = described(metadata) or None
    return write_weights(path, lambda file: save_file(native, file, metadata=header))
