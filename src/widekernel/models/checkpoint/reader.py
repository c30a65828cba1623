"""Safe reading of checkpoint files, whatever container the weights are in."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from widekernel.errors import CheckpointError
from widekernel.file_types import describe_file_type
from widekernel.models.checkpoint.entries import (
    EMA_KEYS,
    MODEL_KEYS,
    find_networks,
    holds_arrays,
    is_averaged,
    is_state_dict,
)
from widekernel.models.checkpoint.shards import find_index, read_shards
from widekernel.models.layouts.layout import State
from widekernel.safe_pickle import Placeholder, RefusedError, UnreadableError, unpickle
from widekernel.tensor_files import read_tensors

_MAX_DEPTH = 8  # of nested containers; an entry may contain itself


@dataclass
class CheckpointContent:
    """The weights in a checkpoint file, and the names of its other entries.

    Attributes:
        state: the requested weights, under their names in the file.
        found_in: name of the entry that holds them; "" for a bare state dict.
        others: names of the other entries, such as the optimizer's.
    """

    state: State
    found_in: str
    others: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, weights: str = "model") -> CheckpointContent:
    """Read the weights of a checkpoint without running any code that it may contain.

    Args:
        path: path of a `.safetensors` file, of a file written by `torch.save`, of the index of a sharded checkpoint, or of
            the folder with that index.
        weights: "model" or "ema".

    Raises:
        CheckpointError: if the file is missing, damaged or unsafe, or holds no such weights.
    """
    path = Path(path)
    if weights not in ("model", "ema"):
        raise CheckpointError(f"weights={weights!r} is unknown: it must be 'model' or 'ema'")
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    index = find_index(path)
    if index:
        if weights == "ema":
            raise CheckpointError(f"{path} is sharded and holds only one set of weights: load weights='model'")
        return CheckpointContent(read_shards(index, lambda shard: _read_file(shard, weights).state), "")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the path of a checkpoint file in it")
    return _read_file(path, weights)


def _read_file(path: Path, weights: str) -> CheckpointContent:
    if path.suffix == ".safetensors":
        return _read_safetensors(path, weights)
    return _find_weights(path, _load(path), weights)


def _load(path: Path) -> Any:
    try:
        return unpickle(path)
    except RefusedError as error:
        raise _unsafe(path, _summary(str(error))) from error
    except UnreadableError as error:
        raise CheckpointError(f"{path} cannot be read here: {_summary(str(error))}; save plain tensors") from error
    except pickle.UnpicklingError as error:
        _raise_if_other_type(path)
        raise CheckpointError(
            f"{path} is damaged, cut off or not a checkpoint ({_summary(str(error))}); nothing in it was run"
        ) from error
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # damaged bytes can make torch.load raise anything
        _raise_if_other_type(path)
        raise CheckpointError(
            f"{path} is damaged, cut off or not a checkpoint ({type(error).__name__}: {_summary(str(error))}): "
            "fetch it again"
        ) from error


def _raise_if_other_type(path: Path) -> None:
    """Raise an error if an unreadable file is recognized as a file of another type."""
    file_type = describe_file_type(path)
    if file_type:
        raise CheckpointError(
            f"{path} is not a checkpoint: it looks like {file_type}. "
            "Give a file that torch.save wrote (.pth, .pt, .bin, ...), or a safetensors file whose name ends in .safetensors"
        )


def _unsafe(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds more than tensors and could run code when loaded; it was not opened. "
        f"({what}) Save its weights alone: torch.save(model.state_dict(), path)"
    )


def _summary(reason: str) -> str:
    """Return the first line of a loader's message, without its advice to load unsafely."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return (lines or ["no reason given"])[0].split(" Please use")[0][:200]


def _find_weights(path: Path, loaded: Any, weights: str, depth: int = 0) -> CheckpointContent:
    """Find the requested weights in the contents of a file, or in those of an entry."""
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{path} holds entries within entries, more than {_MAX_DEPTH} deep: save model.state_dict()")
    if _is_object(loaded):
        raise _unsafe(path, f"where weights are looked for, it has a {loaded.named}")
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    names: tuple[str, ...] = MODEL_KEYS if weights == "model" else EMA_KEYS
    known = [(name, loaded[name]) for name in names if isinstance(loaded.get(name), Mapping)]
    objects = [value for _, value in known if _is_object(value)]
    # A mapping without tensors or mappings is not a container but, for example, the network's settings.
    found = [name for name, value in known if any(isinstance(inner, (Tensor, Mapping)) for inner in value.values())][:1]
    bare = weights == "model" and is_state_dict(loaded)
    found = found or ([] if bare else list(find_networks(loaded, averaged=weights == "ema")))
    if len(found) > 1:
        raise CheckpointError(_several_networks_message(path, found))
    if found:
        return _entry(path, loaded, found[0], depth)
    others = tuple(str(key) for key, value in loaded.items() if not isinstance(value, Tensor))
    if weights == "model" and _holds_tensors(loaded):
        return CheckpointContent(_tensors(path, loaded), "", others)
    if objects:
        raise _unsafe(path, f"where weights are looked for, it has a {objects[0].named}")
    if holds_arrays(loaded) or any(holds_arrays(value) for _, value in known):
        raise CheckpointError(
            f"{path} holds NumPy arrays, not tensors: save "
            "{key: torch.from_numpy(array) for key, array in state.items()} with torch.save"
        )
    raise CheckpointError(_no_weights_message(path, loaded, weights, others))


def _entry(path: Path, loaded: Mapping[Any, Any], name: str, depth: int) -> CheckpointContent:
    """Return the weights in an entry, or in an entry of the entry."""
    inner = loaded[name]
    others = tuple(str(key) for key in loaded if key != name)
    if not _holds_tensors(inner):
        within = _find_weights(path, inner, "model", depth + 1)  # downstream RepLKNet: model -> state_dict
        return CheckpointContent(within.state, f"{name}.{within.found_in}".rstrip("."), (*others, *within.others))
    no_tensors = tuple(f"{name}.{key}" for key, value in inner.items() if not isinstance(value, Tensor))
    return CheckpointContent(_tensors(path, inner), name, (*others, *no_tensors))


def _several_networks_message(path: Path, found: list[str]) -> str:
    return (
        f"{path} holds the weights of several networks, in {', '.join(found)}: save the one to load by itself, as "
        f"torch.save(torch.load(path)[{found[0]!r}], 'weights.pth')"
    )


def _no_weights_message(path: Path, loaded: Mapping[Any, Any], weights: str, others: tuple[str, ...]) -> str:
    """Return the message that no weights of the requested kind exist; it names the other weights."""
    held = f"its entries are {', '.join(others) or ('none' if weights == 'model' else 'only weights')}"
    if weights == "ema":
        there = _holds_tensors(loaded) or any(name in loaded for name in MODEL_KEYS) or find_networks(loaded, averaged=False)
        advice = ": load weights='model' for those that are not averaged" if there else ""
        return f"{path} holds no averaged (EMA) weights; {held}{advice}"
    averaged = any(isinstance(loaded[name], Mapping) and is_averaged(str(name)) for name in loaded)
    return f"{path} holds no weights; {held}{': load weights=' + repr('ema') if averaged else ''}"


def _is_object(value: Any) -> bool:
    """Return whether a value stands for an object of unknown contents."""
    return isinstance(value, Placeholder) and not value


def _holds_tensors(mapping: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in mapping.values())


def _tensors(path: Path, state: Mapping[str, Any]) -> State:
    """Return the tensors of a state dict; raise an error if it holds objects, which may stand for weights."""
    for key, value in state.items():
        if isinstance(value, Placeholder) and not value.harmless:
            raise _unsafe(path, f"among the weights, {key} is a {value.named}")
    return {str(key): _resolved(value) for key, value in state.items() if isinstance(value, Tensor)}


def _resolved(value: Tensor) -> Tensor:
    """Return the actual values of a tensor with a lazy negation or conjugation."""
    return value.resolve_conj().resolve_neg() if value.is_conj() or value.is_neg() else value


def _read_safetensors(path: Path, weights: str) -> CheckpointContent:
    if weights == "ema":
        raise CheckpointError(f"{path} is a safetensors file, which holds one set of weights: load weights='model'")
    try:
        return CheckpointContent(read_tensors(path), "")
    except (SafetensorError, ValueError, OSError) as error:
        _raise_if_other_type(path)
        raise CheckpointError(f"{path} is damaged, cut off or not a safetensors file ({error}): fetch it again") from error
