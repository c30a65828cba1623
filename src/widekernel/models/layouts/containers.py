"""Reading checkpoint files safely, whatever container the weights are in."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from widekernel.errors import CheckpointError
from widekernel.models.layouts import kinds, pickles
from widekernel.models.layouts.layout import State
from widekernel.models.layouts.pickles import Placeholder

# Where the official scripts, timm and the mm* frameworks keep the weights, in the order in which they are looked for.
MODEL_KEYS = ("model", "state_dict", "module", "model_state")
EMA_KEYS = ("model_ema", "state_dict_ema", "ema", "model_ema_state")
_DEEPEST = 8  # containers within containers; an entry may hold itself


@dataclass
class Container:
    """What a checkpoint file holds.

    Attributes:
        state: the weights asked for, as they are named in the file.
        found_in: the entry that they were in, "" for a bare state dict.
        others: names of the other entries, such as the optimizer's.
    """

    state: State
    found_in: str
    others: tuple[str, ...] = ()


def read(path: str | Path, weights: str = "model") -> Container:
    """Read the weights of a checkpoint without running any code that it may carry.

    Args:
        path: a `.safetensors` file or one written by `torch.save`.
        weights: "model" or "ema".

    Raises:
        CheckpointError: if the file is missing, damaged, unsafe, or holds no such weights.
    """
    path = Path(path)
    if weights not in ("model", "ema"):
        raise CheckpointError(f"weights={weights!r} is unknown: it must be 'model' or 'ema'")
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the path of a checkpoint file in it")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, weights)
    return _pick(path, _load(path), weights)


def _load(path: Path) -> Any:
    try:
        return pickles.load(path)
    except pickles.RefusedError as error:
        raise _unsafe(path, _summary(str(error))) from error
    except pickles.UnreadableError as error:
        raise CheckpointError(f"{path} cannot be read here: {_summary(str(error))}; save plain tensors") from error
    except pickle.UnpicklingError as error:
        _refuse_other_kinds(path)
        raise CheckpointError(
            f"{path} is damaged, cut off or not a checkpoint ({_summary(str(error))}); nothing in it was run"
        ) from error
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        _refuse_other_kinds(path)
        raise CheckpointError(
            f"{path} is damaged, cut off or not a checkpoint ({type(error).__name__}: {_summary(str(error))}): "
            "fetch it again"
        ) from error


def _refuse_other_kinds(path: Path) -> None:
    """Raise if a file that could not be read is recognised as something else."""
    kind = kinds.looks_like(path)
    if kind:
        raise CheckpointError(
            f"{path} is no checkpoint: it looks like {kind}. Give a file written by torch.save (.pth, .pt, .bin, ...) or a "
            "safetensors file whose name ends in .safetensors"
        )


def _unsafe(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds more than tensors and could run code when loaded; it was not opened. "
        f"({what}) Save its weights alone: torch.save(model.state_dict(), path)"
    )


def _summary(reason: str) -> str:
    """Give the first line of a loader's message, without its advice to load unsafely."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return (lines or ["no reason given"])[0].split(" Please use")[0][:200]


def _pick(path: Path, loaded: Any, weights: str, depth: int = 0) -> Container:
    if depth > _DEEPEST:
        raise CheckpointError(f"{path} holds entries within entries, more than {_DEEPEST} deep: save model.state_dict()")
    if isinstance(loaded, Placeholder) and not loaded:
        raise _unsafe(path, f"where weights are looked for, it has a {loaded.named}")
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    objects = []
    for name in MODEL_KEYS if weights == "model" else EMA_KEYS:
        inner = loaded.get(name)
        if isinstance(inner, Placeholder) and not inner:
            objects.append(inner)
        elif isinstance(inner, Mapping):
            others = tuple(str(key) for key in loaded if key != name)
            if not _holds_tensors(inner):
                within = _pick(path, inner, "model", depth + 1)  # downstream RepLKNet: model -> state_dict
                return Container(within.state, f"{name}.{within.found_in}".rstrip("."), (*others, *within.others))
            unlike = tuple(f"{name}.{key}" for key, value in inner.items() if not isinstance(value, Tensor))
            return Container(_tensors(path, inner), name, (*others, *unlike))
    others = tuple(str(key) for key, value in loaded.items() if not isinstance(value, Tensor))
    if weights == "ema" and not objects:
        raise CheckpointError(
            f"{path} holds no averaged (EMA) weights; its entries are {', '.join(others) or 'only weights'}: "
            "load weights='model'"
        )
    if weights == "model" and _holds_tensors(loaded):
        return Container(_tensors(path, loaded), "", others)
    if objects:
        raise _unsafe(path, f"where weights are looked for, it has a {objects[0].named}")
    averaged = [name for name in EMA_KEYS if name in others]
    advice = ": load weights='ema'" if averaged else ""
    raise CheckpointError(f"{path} holds no weights; its entries are {', '.join(others) or 'none'}{advice}")


def _holds_tensors(mapping: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in mapping.values())


def _tensors(path: Path, state: Mapping[str, Any]) -> State:
    """Give the tensors among the weights; refuse objects among them, of which nobody knows what they stand for."""
    for key, value in state.items():
        if isinstance(value, Placeholder) and not value.harmless:
            raise _unsafe(path, f"among the weights, {key} is a {value.named}")
    return {str(key): _resolved(value) for key, value in state.items() if isinstance(value, Tensor)}


def _resolved(value: Tensor) -> Tensor:
    """Give the numbers themselves of a tensor whose memory holds their negatives or conjugates."""
    return value.resolve_conj().resolve_neg() if value.is_conj() or value.is_neg() else value


def _read_safetensors(path: Path, weights: str) -> Container:
    if weights == "ema":
        raise CheckpointError(f"{path} is a safetensors file, which holds one set of weights: load weights='model'")
    try:
        with safe_open(path, framework="pt") as file:
            return Container({key: file.get_tensor(key) for key in file.keys()}, "")  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        _refuse_other_kinds(path)
        raise CheckpointError(f"{path} is damaged, cut off or not a safetensors file ({error}): fetch it again") from error
