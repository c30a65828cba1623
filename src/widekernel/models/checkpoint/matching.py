"""Matching of the tensors of a file with those of a network: which are loaded, which are skipped, and what is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from widekernel.models.layouts.conversion import HEAD_PREFIXES, Converted, is_classifier_key, is_head_key
from widekernel.models.layouts.nesting import Nesting

# Parts of keys that the network lacks, and what to do about them; the first that fits is reported. `$` is the end of a key.
_REMEDIES = {
    (".parametrizations.weight.0.logits$",): (
        "the file is of a network whose 2:4 masks are being learned: save it after "
        "widekernel.sparsity.semi_structured.convert, or prepare this network alike before loading"
    ),
    (".parametrizations.",): (
        "the file is of a network with parametrized weights: call torch.nn.utils.parametrize.remove_parametrizations on "
        "its layers before saving it, or parametrize this network alike before loading"
    ),
    (".weight_g$", ".weight_v$"): (
        "the file is of a network with weight normalization: call torch.nn.utils.remove_weight_norm on its layers before "
        "saving it, or normalize this network alike before loading"
    ),
    (".weight_orig$", ".weight_u$"): (
        "the file is of a network with spectral normalization: call torch.nn.utils.remove_spectral_norm on its layers "
        "before saving it, or normalize this network alike before loading"
    ),
}
_LINEAR_CLASSIFIER = "head.fc.weight"


@dataclass
class Match:
    """The match between the tensors of a file and those of a network.

    Attributes:
        accepted: our key -> tensor to load.
        dropped: keys of the file that belong to another classifier.
        missing: our keys that the file lacks, and is allowed to lack.
        ignored: keys of the file that belong to parts that this network lacks.
        problems: one message for every error.
        why_dropped: how the classifiers differ, or "".
        conversions: changes of type, such as "float16 to float32".
    """

    accepted: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    why_dropped: str = ""
    conversions: set[str] = field(default_factory=set)


def match_weights(
    own: Mapping[str, Tensor], converted: Converted, is_backbone: bool, removed: tuple[str, ...], nesting: Nesting
) -> Match:
    """Sort the tensors of a file into those to load, those to skip, and those that are an error.

    Args:
        own: the network's state dict.
        converted: the file's state dict in our layout.
        is_backbone: whether the file holds the network as the backbone of a larger one, whose other parts are ignored.
        removed: prefixes of keys that belong to parts that were removed from the network.
        nesting: which network of ours the network contains, if it is not that network itself.
    """
    match = Match(ignored=list(converted.unknown) if is_backbone else [])
    if not is_backbone:
        match.problems += [f"{key}: the network has no such weight" for key in converted.unknown]
    other_classifier = _compare_classifiers(own, converted.state)
    headless = not any(map(is_classifier_key, own))
    for key, value in converted.state.items():
        name, local = converted.source_keys.get(key, key), nesting.local(key)
        if is_classifier_key(local) and (other_classifier or headless):
            match.dropped.append(name)
            match.why_dropped = other_classifier
        elif key.startswith(removed):
            match.ignored.append(name)
        elif key not in own:
            # A feature extractor without a head does not use the final norm either.
            if local.startswith(HEAD_PREFIXES) and not any(k.startswith(HEAD_PREFIXES) for k in own):
                match.dropped.append(name)
            else:
                match.problems.append(f"{name}: the network has no such weight")
        elif value.shape != own[key].shape:
            match.problems.append(f"{name} has shape {tuple(value.shape)} but the network's is {tuple(own[key].shape)}")
        elif problem := _type_problem(value, own[key]):
            match.problems.append(f"{name} {problem}")
        else:
            match.accepted[key] = value
            if value.dtype != own[key].dtype:
                match.conversions.add(f"{value.dtype} to {own[key].dtype}".replace("torch.", ""))
    _find_missing(own, converted, match, bool(other_classifier), _left_out(converted, nesting))
    if match.problems:
        match.problems += _remedies(own, converted.unknown or converted.state)
    return match


def storage_problem(value: Tensor) -> str:
    """Return why a tensor of a file cannot be used by any network; "" if it can."""
    if value.is_meta:
        return "has a shape but no data in the file"
    return "" if value.layout is torch.strided else f"is stored as {value.layout}, the network's is dense"


def _type_problem(value: Tensor, own: Tensor) -> str:
    """Return why a tensor of a file cannot be copied to a tensor of the network; "" if it can."""
    if own.is_meta:
        return "cannot be loaded: the network was created without data; call model.to_empty(device=...) first"
    kinds = [(t.dtype.is_floating_point, t.dtype.is_complex) for t in (value, own)]
    return "" if kinds[0] == kinds[1] else f"has type {value.dtype} but the network's is {own.dtype}"


def _left_out(converted: Converted, nesting: Nesting) -> tuple[str, ...]:
    """Return the prefixes of our keys that a file of the inner network alone lacks; not those of which it has a part."""
    return tuple(prefix for prefix in nesting.optional if not any(key.startswith(prefix) for key in converted.state))


def _find_missing(
    own: Mapping[str, Tensor], converted: Converted, match: Match, other_classifier: bool, left_out: tuple[str, ...]
) -> None:
    """Add our keys that the file lacks to `missing`, or to the problems if the file must have them."""
    headless = not any(map(is_classifier_key, converted.state))
    for key in own:
        if key in converted.state or key in converted.generated:
            continue
        of_head = headless and is_head_key(key)
        if (
            key.startswith(left_out)
            or key.endswith("num_batches_tracked")
            or of_head
            or (other_classifier and is_classifier_key(key))
        ):
            match.missing.append(key)
        else:
            match.problems.append(f"{key}: the file holds no such weight")


def _compare_classifiers(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Return how the classifiers differ; "" if they do not, or if one of them is missing.

    A linear classifier for features of another width does not count as different: it belongs to another network.
    """
    theirs, ours = ({key: value for key, value in each.items() if is_classifier_key(key)} for each in (state, own))
    if not theirs or not ours:
        return ""
    if _LINEAR_CLASSIFIER in theirs and _LINEAR_CLASSIFIER in ours:
        a, b = theirs[_LINEAR_CLASSIFIER].shape, ours[_LINEAR_CLASSIFIER].shape
        return "" if a == b or a[1:] != b[1:] else f"they are for {a[0]} classes, the network has {b[0]}"
    if theirs.keys() != ours.keys():
        return f"the network's classifier is built differently ({', '.join(ours)})"
    different = [key for key in ours if theirs[key].shape != ours[key].shape]
    return (
        f"{different[0]} has shape {tuple(theirs[different[0]].shape)}, the network's {tuple(ours[different[0]].shape)}"
        if different
        else ""
    )


def _remedies(own: Mapping[str, Tensor], keys: Iterable[str]) -> list[str]:
    """Return advice for a file with weights in a form that the network lacks, as a list of at most one message."""
    foreign = [key for key in keys if key not in own]
    return [remedy for parts, remedy in _REMEDIES.items() if all(any(p in f"{key}$" for key in foreign) for p in parts)][:1]
