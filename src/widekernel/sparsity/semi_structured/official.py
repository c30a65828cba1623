"""Official checkpoints, from the paper's code (Danhofer, arXiv 2411.00288), for torchvision's ResNets and ConvNeXts.

They hold a 2:4 layer as matrices (out, in·kh·kw): `Ws.<group>` and `bs.<group>`, or one block-diagonal `W` and `b`,
with `choice_weights` (quadruplets · groups, 6) and the table `masking_patterns`; rows or columns may be padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.errors import CheckpointError
from widekernel.safe_pickle import RefusedError, unpickle
from widekernel.sparsity.semi_structured.eligibility import Layer, conv_groups, layer_name, layers_of
from widekernel.sparsity.semi_structured.grouping import Axis, group_count, matrix_shape
from widekernel.sparsity.semi_structured.patterns import pattern_table
from widekernel.tensor_files import read_tensors

AXIS: Axis = "im2col"
CONTAINERS = ("model", "state_dict")
_OWN = ("choice_weights", "masking_patterns", "zero_bias", "W", "b")


@dataclass(frozen=True)
class OfficialMasks:
    """Masks of an official checkpoint; its weights are loaded into the network, dense.

    Pass `logits` to `prepare(model, SemiStructuredConfig(method="learned", axis="im2col"), logits=...)` to continue
    learning, or `choices` to `prepare(model, SemiStructuredConfig(axis="im2col"), choices=...)` for the fixed masks.

    Attributes:
        logits: parameter name -> (G, 6) float32, the file's `choice_weights`.
        choices: parameter name -> (G,) uint8, the argmax of the logits; of equal logits the first.
        key_map: name in the file -> name in the network, for all weights loaded.
        biases: layers that got a bias, because the file's `zero_bias`, which is added to outputs, is not zero.
        dropped: keys of the file with no counterpart in the network: tables, zeros, `zero_bias` of layers with a bias.
        axis: the grouping of all masks.
    """

    logits: dict[str, Tensor]
    choices: dict[str, Tensor]
    key_map: dict[str, str]
    biases: tuple[str, ...]
    dropped: tuple[str, ...]
    axis: Axis = AXIS


def load_official(model: nn.Module, source: str | Path | Mapping[str, Any]) -> OfficialMasks:
    """Load an official 2:4 checkpoint into a dense network.

    For layers with learned `choice_weights` the masks are returned. The official evaluation draws new masks at every forward
    pass; here the most probable ones are used. Plain dense checkpoints load as well, without masks.

    Args:
        model: torchvision's network (ResNet-18/34/50, ConvNeXt-T/S), or timm's with the same keys.
        source: a file of `torch.save` or a state dict, bare or under "model" or "state_dict". Nothing in a file is executed.

    Raises:
        CheckpointError: if the file cannot be read safely; if it does not fit the model (the message names every key); if
            its table of patterns was trained away from 0 and 1 (a defect of the official code), so that its masks are no
            longer 2:4; or if a blocked layer without masks has weights between groups. The model is unchanged then.
    """
    where, state = _read(source)
    translation = _Translation()
    layers = layers_of(model)
    for prefix in sorted({prefix for key in state if (prefix := _owner(key)) is not None}):
        if prefix not in layers:
            translation.problems.append(f"{prefix}: the network has no such convolution or linear layer")
            translation.seen |= {key for key in state if key.startswith(f"{prefix}.")}
            continue
        own = {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}
        _translate(prefix, layers[prefix], own, translation)
    for key, value in state.items():
        if key not in translation.seen:
            translation.add(key, key, value)
    added = _compare(model, translation)
    if translation.problems:
        listed = "\n".join(f"  {problem}" for problem in translation.problems)
        raise CheckpointError(f"{where} does not fit the {type(model).__name__}; nothing was loaded:\n{listed}")
    for key in added:
        layer = layers[layer_name(key)]
        layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0].flatten(1)[:, 0]))
    model.load_state_dict(translation.state)
    choices = {name: value.argmax(1).to(torch.uint8) for name, value in translation.logits.items()}
    biases = tuple(layer_name(key) for key in added)
    return OfficialMasks(translation.logits, choices, translation.key_map, biases, tuple(translation.dropped))


@dataclass
class _Translation:
    state: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    key_map: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def add(self, theirs: str, ours: str, value: Tensor) -> None:
        if ours in self.state:
            self.problems.append(f"{theirs}: the file also holds {ours} in another form")
        self.seen.add(theirs)
        self.state[ours] = value
        self.key_map[theirs] = ours

    def source_of(self, ours: str) -> str:
        return next(theirs for theirs, name in self.key_map.items() if name == ours)

    def drop(self, theirs: str) -> None:
        self.seen.add(theirs)
        self.dropped.append(theirs)


def _owner(key: str) -> str | None:
    """Return the name of the layer that a key of the 2:4 layout belongs to, or None for other keys."""
    prefix, _, last = key.rpartition(".")
    if last in _OWN:
        return prefix
    before, _, kind = prefix.rpartition(".")
    return before if last.isdigit() and kind in ("Ws", "bs") else None


def _translate(prefix: str, layer: Layer, own: dict[str, Tensor], translation: _Translation) -> None:
    """Translate all keys of one layer; those of `own` are without its prefix."""
    groups = conv_groups(layer)
    rows, columns = matrix_shape(layer.weight.shape, AXIS, groups)
    has_masks = "choice_weights" in own
    matrices = [f"Ws.{group}" for group in range(groups)]
    if "W" in own or all(name in own for name in matrices):
        names = ["W"] if "W" in own else matrices
        blocks = _blocks(own["W"], groups) if "W" in own else [own[name] for name in names]
        if "W" in own and not has_masks and _between_groups(own["W"], groups):
            translation.problems.append(
                f"{prefix}.W has weights between its {groups} groups and no mask: it is not a grouped convolution"
            )
        if any(block.dim() != 2 or block.shape[0] < rows or block.shape[1] < columns for block in blocks):
            shapes = ", ".join(str(tuple(own[name].shape)) for name in names)
            translation.problems.append(f"{prefix}: {shapes} is too small for {groups} matrices of {(rows, columns)}")
            return
        weight = torch.cat([block[:rows, :columns] for block in blocks]).reshape(layer.weight.shape)
        translation.add(f"{prefix}.{names[0]}", f"{prefix}.weight", weight)
        translation.seen |= {f"{prefix}.{name}" for name in names}
        _translate_bias(prefix, layer, own, rows, groups, translation)
    patterns = own.get("masking_patterns")
    if patterns is not None:
        if not torch.equal(patterns.float().cpu(), pattern_table(dtype=torch.float32)):
            translation.problems.append(
                f"{prefix}.masking_patterns: the table of patterns was trained and is no longer 0 and 1, so these masks "
                "are not 2:4; train again with the table frozen, or restore the constant table to accept another network"
            )
        translation.drop(f"{prefix}.masking_patterns")
    if has_masks:
        logits, wanted = own["choice_weights"], (group_count(layer.weight.shape, AXIS, groups), 6)
        if tuple(logits.shape) != wanted or not bool(logits.isfinite().all()):
            translation.problems.append(
                f"{prefix}.choice_weights must be finite and of shape {wanted}, not {tuple(logits.shape)}"
            )
        translation.seen.add(f"{prefix}.choice_weights")
        translation.logits[f"{prefix}.weight"] = logits.detach().float().clone()


def _translate_bias(
    prefix: str, layer: Layer, own: dict[str, Tensor], rows: int, groups: int, translation: _Translation
) -> None:
    separate = [f"bs.{group}" for group in range(groups)]
    outputs = layer.weight.shape[0]
    if "b" in own:
        translation.add(f"{prefix}.b", f"{prefix}.bias", own["b"][:outputs])
    elif all(name in own for name in separate):
        translation.add(f"{prefix}.bs.0", f"{prefix}.bias", torch.cat([own[name][:rows] for name in separate]))
        translation.seen |= {f"{prefix}.{name}" for name in separate}
    if "zero_bias" in own:
        zero = own["zero_bias"]
        if f"{prefix}.bias" in translation.state or not bool(zero.any()):
            translation.drop(f"{prefix}.zero_bias")
        else:  # one vector for every group
            translation.add(f"{prefix}.zero_bias", f"{prefix}.bias", zero[:rows].repeat(groups))


def _blocks(matrix: Tensor, groups: int) -> list[Tensor]:
    """Return the diagonal blocks of a block-diagonal matrix."""
    high, wide = matrix.shape[0] // groups, matrix.shape[-1] // groups
    return [matrix[g * high : (g + 1) * high, g * wide : (g + 1) * wide] for g in range(groups)]


def _between_groups(matrix: Tensor, groups: int) -> bool:
    return bool(matrix.ne(torch.block_diag(*_blocks(matrix, groups))).any())


def _compare(model: nn.Module, translation: _Translation) -> list[str]:
    """Record what does not fit the network, and return the biases that have to be added to it."""
    own = model.state_dict()
    added = [key for key in translation.state if key not in own and translation.source_of(key).endswith(".zero_bias")]
    for theirs, ours in translation.key_map.items():
        if ours in added:
            continue
        if ours not in own:
            translation.problems.append(f"{theirs}: the network has no weight {ours}")
        elif translation.state[ours].shape != own[ours].shape:
            translation.problems.append(
                f"{theirs} has shape {tuple(translation.state[ours].shape)}, the network's {ours} {tuple(own[ours].shape)}"
            )
    for ours in own:
        if ours not in translation.state and not ours.endswith("num_batches_tracked"):
            translation.problems.append(f"{ours}: the file holds nothing for it")
        elif ours not in translation.state:
            translation.state[ours] = own[ours]
    return added


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Return a name for the source, and its weights without prefixes of wrappers."""
    where, loaded = ("the state dict", source) if isinstance(source, Mapping) else (str(source), _load(Path(source)))
    for name in CONTAINERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{where} holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    state = {str(key).removeprefix("module."): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{where} holds no weights: save model.state_dict()")
    return where, state


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        return read_tensors(path) if path.suffix == ".safetensors" else unpickle(path)
    except RefusedError as error:
        raise CheckpointError(f"{path} holds more than tensors and could run code; it was not opened ({error})") from error
    except Exception as error:  # damaged bytes can make torch.load raise anything
        raise CheckpointError(f"{path} is damaged, cut off or not a checkpoint ({error}): fetch it again") from error
