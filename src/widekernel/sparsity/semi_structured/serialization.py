"""Sparse files: 2:4 networks as safetensors files of values and packed choices, about half the size of dense files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from widekernel.errors import ArgumentError, CheckpointError, WidekernelError
from widekernel.layers.notes import recall, remember
from widekernel.layers.wrappers import unwrap
from widekernel.sparsity.semi_structured.config import check_axis
from widekernel.sparsity.semi_structured.controller import SemiStructured
from widekernel.sparsity.semi_structured.conversion import convert, manifest_of, refreshed, validate
from widekernel.sparsity.semi_structured.eligibility import layer_name
from widekernel.sparsity.semi_structured.encoding import decode, encode, unpack_choices
from widekernel.sparsity.semi_structured.hardware import is_compressed
from widekernel.sparsity.semi_structured.manifest import Manifest, MaskedWeight
from widekernel.tensor_files import described, tensor_file, write_weights

# Keys of the file format, which version 0.4 introduced; they contain the name that 2:4 sparsity had then.
HEADER = "widekernel.two_four"
VERSION = 1
VALUES, CHOICES = "two_four.values", "two_four.choices"


def save_sparse(what: nn.Module | SemiStructured, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Save a 2:4 network as kept weights and choices, atomically.

    A masked weight `name` is stored as `name.two_four.values` (G, 2) and `name.two_four.choices` (base 6, three per byte);
    everything else is stored as it is. The header holds axes and shapes.

    Args:
        what: a prepared network or its controller, or a converted one ("dense"). Learned masks are saved as evaluation
            applies them, without logits.
        path: ends in `.safetensors`.
        metadata: values that JSON can represent, stored as by `widekernel.save_checkpoint`.

    Raises:
        ArgumentError: if the network has no masks or a weight is not 2:4.
        CheckpointError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} must end in .safetensors")
    network = what.model if isinstance(what, SemiStructured) else unwrap(what)
    manifest = manifest_of(network)
    record = recall(network)
    validate(network)
    manifest = refreshed(network, manifest)
    if isinstance(record, SemiStructured) and record.is_learned:
        network = convert(network)
    state = network.state_dict()
    packed_already = [name for name in manifest.weights if is_compressed(network.get_submodule(layer_name(name)))]
    if packed_already:
        raise ArgumentError(
            f"{', '.join(packed_already)} are not plain weights: save the result of convert(model, target='dense')"
        )
    shapes = {name: list(value.shape) for name, value in state.items()}
    tensors = {}
    for name, value in state.items():
        known = manifest.weights.get(name)
        if known is None:
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            continue
        values, packed = encode(value.detach().cpu(), known.choices.cpu(), known.axis, known.groups)
        tensors[f"{name}.{VALUES}"], tensors[f"{name}.{CHOICES}"] = values.contiguous(), packed
    weights = {name: {"axis": known.axis, "groups": known.groups} for name, known in manifest.weights.items()}
    header = {"version": VERSION, "weights": weights, "shapes": shapes}
    about = {HEADER: json.dumps(header, sort_keys=True), **described(metadata)}
    return write_weights(path, lambda file: save_file(tensors, file, metadata=about))


def is_sparse_file(path: str | Path) -> bool:
    """Return whether `path` is a readable file that `save_sparse` wrote."""
    try:
        with tensor_file(path) as file:
            return HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_sparse(model: nn.Module, path: str | Path) -> Manifest:
    """Load a file of `save_sparse` into a plain network of the same architecture; weights are restored bit for bit.

    Args:
        model: the network, dense or converted; it then carries the choices, so that it can be saved and converted again.
        path: the file.

    Returns:
        The record that the network now carries.

    Raises:
        CheckpointError: if the file is damaged, of another kind, or holds another network; the model is left unchanged, and
            the message names every weight that differs.
    """
    path = Path(path)
    if isinstance(recall(model), SemiStructured):
        raise ArgumentError(f"the {type(model).__name__} is prepared: load into a plain network, or into convert(model)")
    tensors, header = _read(path)
    own = model.state_dict()
    _refuse_other_network(path, model, own, header)
    state, weights = {}, {}
    try:
        for name, shape in header["shapes"].items():
            if name not in header["weights"]:
                state[name] = tensors[name]
                continue
            axis, groups = header["weights"][name]["axis"], header["weights"][name]["groups"]
            check_axis(axis)
            values, packed = tensors[f"{name}.{VALUES}"], tensors[f"{name}.{CHOICES}"]
            state[name] = decode(values, packed, shape, axis, groups)
            device = own[name].device
            weights[name] = MaskedWeight(axis, groups, unpack_choices(packed, values.shape[0]).to(device))
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: it lacks {error}") from None
    except WidekernelError as error:
        raise CheckpointError(f"{path} is damaged: {name}: {error}") from None
    wrong = [
        f"{name} is {state[name].dtype} {tuple(state[name].shape)} but the network's is {own[name].dtype} "
        f"{tuple(own[name].shape)}"
        for name in own
        if (state[name].shape, state[name].dtype) != (own[name].shape, own[name].dtype)
    ]
    _refuse(path, model, wrong)
    model.load_state_dict(state)
    manifest = Manifest(weights)
    remember(model, manifest)
    return manifest


def _refuse_other_network(path: Path, model: nn.Module, own: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    shapes = header["shapes"]
    problems = [f"{name}: the network has no such weight" for name in shapes if name not in own]
    problems += [f"{name}: the file holds no such weight" for name in own if name not in shapes]
    problems += [
        f"{name} has shape {tuple(shapes[name])} but the network's is {tuple(own[name].shape)}"
        for name in own
        if name in shapes and tuple(shapes[name]) != tuple(own[name].shape)
    ]
    _refuse(path, model, problems)


def _refuse(path: Path, model: nn.Module, problems: list[str]) -> None:
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(
            f"{path} holds a network that differs from this {type(model).__name__}; nothing was loaded. Make it with "
            f"the arguments and the dtype of the saved one:\n{listed}"
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: give the path of a file that save_sparse wrote")
    try:
        with tensor_file(path) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, cut off or not a safetensors file ({error}): fetch it again") from error
    if HEADER not in metadata:
        raise CheckpointError(f"{path} holds no 2:4 network: save one with save_sparse")
    try:
        header = json.loads(metadata[HEADER])
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged: its header does not describe a network")
    if header.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {header.get('version')!r}: this widekernel reads version {VERSION}")
    if not all(isinstance(header.get(key), dict) for key in ("shapes", "weights")):
        raise CheckpointError(f"{path} is damaged: its header does not describe a network")
    return tensors, header
