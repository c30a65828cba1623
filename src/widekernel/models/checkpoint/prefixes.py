"""Removal of the prefixes that wrappers and larger networks put before the keys of a network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Set

from widekernel.errors import CheckpointError
from widekernel.models.layouts.layout import State

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
# Modules that wrap a part of a network, such as a compiled stage.
_PART_WRAPPERS = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Buffers that thop, an operation counter, adds to every module.
_THOP_BUFFERS = ("total_ops", "total_params")
# Fraction of the keys that another network may have in common by chance, such as those of the head and of norms.
_CHANCE_OVERLAP = 1 / 8
# A prefix with at least this fraction of the best prefix's keys marks another copy of the network.
_COPY_OVERLAP = 0.9


def strip_prefixes(state: State, known: Set[str]) -> tuple[State, tuple[str, ...], tuple[str, ...]]:
    """Remove the prefixes of wrappers (DDP, compiled modules, feature extractors, larger networks) from the keys.

    Args:
        state: state dict of the file.
        known: keys that the network takes, in any layout.

    Returns:
        the state dict, the removed prefixes, and the keys that were skipped because they belong to other parts of a larger
        network.

    Raises:
        CheckpointError: if the file holds the network more than once.
    """
    removed: list[str] = []
    # OpenMMLab adds averaged weights as buffers of the whole network: `ema_head_weight` of `head.weight`.
    averaged = {f"ema_{key.replace('.', '_')}" for key in state}
    others = [key for key in state if (key.rpartition(".")[2] in _THOP_BUFFERS or key in averaged) and key not in known]
    skipped = set(others)
    state = {key: value for key, value in state.items() if key not in skipped}
    while True:
        prefix = _wrapper_prefix(state, known)
        if not prefix:
            state, around = _unwrap_parts(state, known)
            removed += around
            prefix = _prefix_of_network(state, known)
        if not prefix:
            return state, tuple(removed), tuple(others)
        others += [key for key in state if not key.startswith(prefix)]
        state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        removed.append(prefix)


def _wrapper_prefix(state: State, known: Set[str]) -> str:
    """Return the first of the usual wrappers' prefixes that the keys have, and the network's do not; "" if there is none."""
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in known):
            continue
        inside = sum(key.startswith(prefix) for key in state)
        # `AveragedModel` has a counter next to the wrapped weights.
        if inside and (prefix == "backbone." or inside == len(state.keys() - {"n_averaged"})):
            return prefix
    return ""


def _unwrap_parts(state: State, known: Set[str]) -> tuple[State, list[str]]:
    """Remove wrapper names from the middle of the keys, unless the network is wrapped in the same way; also return them."""
    new = {key: key if key in known else _PART_WRAPPERS.sub("", key) for key in state}
    twice = [key for key, count in Counter(new.values()).items() if count > 1]
    if twice:
        raise CheckpointError(f"the file holds {twice[0]} twice, once within a wrapper: remove one")
    wrappers = {f"{match}." for key, name in new.items() if key != name for match in _PART_WRAPPERS.findall(key)}
    return {new[key]: value for key, value in state.items()}, sorted(wrappers)


def _prefix_of_network(state: Iterable[str], known: Set[str]) -> str:
    """Return the prefix under which most of the network's keys are found; "" if there is no prefix or no such keys."""
    found: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in known:
                found[".".join([*parts[:i], ""]).lstrip(".")] += 1
    best = found.most_common(1)[0][1] if found else 0
    if best <= _CHANCE_OVERLAP * len(known):
        return ""
    good = [prefix for prefix, count in found.items() if count >= _COPY_OVERLAP * best]
    if "" in good or len(good) == 1:
        return "" if "" in good else good[0]
    one = repr(good[0])
    raise CheckpointError(
        f"the file holds the network {len(good)} times, under {', '.join(good)}: save the weights of one, as torch.save("
        f"{{key.removeprefix({one}): value for key, value in state.items() if key.startswith({one})}}, 'weights.pth')"
    )
