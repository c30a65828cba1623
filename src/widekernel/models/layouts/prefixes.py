"""The prefixes that wrappers and larger networks put before the keys of a network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Set

from widekernel.errors import CheckpointError
from widekernel.models.layouts.layout import State

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
# Modules that stand around a part of a network, such as a compiled stage.
_AROUND_PARTS = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What thop, which counts operations, leaves behind in every module.
_COUNTERS = ("total_ops", "total_params")
_A_FEW = 1 / 8  # of the keys may be in common by chance, such as those of the head and of norms
_AS_GOOD = 0.9


def strip_prefixes(state: State, known: Set[str]) -> tuple[State, tuple[str, ...], tuple[str, ...]]:
    """Remove the prefixes of wrappers (DDP, compiled modules, feature extractors, larger networks) from the keys.

    Args:
        state: as in the file.
        known: keys that the network would take, in any layout.

    Returns:
        The state dict, the prefixes removed, and the keys left out because they belong to other parts of the network.

    Raises:
        CheckpointError: if the network lies in the file more than once.
    """
    removed: list[str] = []
    others = [key for key in state if key.rpartition(".")[2] in _COUNTERS and key not in known]
    state = {key: value for key, value in state.items() if key not in set(others)}
    while True:
        prefix = _usual_prefix(state)
        if not prefix:
            state, around = _without_wrapped_parts(state, known)
            removed += around
            prefix = _where(state, known)
        if not prefix:
            return state, tuple(removed), tuple(others)
        others += [key for key in state if not key.startswith(prefix)]
        state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        removed.append(prefix)


def _usual_prefix(state: State) -> str:
    for prefix in PREFIXES:
        inside = sum(key.startswith(prefix) for key in state)
        # A model averaged over training has a counter beside the wrapped weights.
        if inside and (prefix == "backbone." or inside == len(state.keys() - {"n_averaged"})):
            return prefix
    return ""


def _without_wrapped_parts(state: State, known: Set[str]) -> tuple[State, list[str]]:
    """Take the names of wrappers out of the middle of the keys, unless the network is wrapped alike."""
    new = {key: key if key in known else _AROUND_PARTS.sub("", key) for key in state}
    twice = [key for key, count in Counter(new.values()).items() if count > 1]
    if twice:
        raise CheckpointError(f"the file holds {twice[0]} twice, once within a wrapper: remove one")
    wrappers = {f"{match}." for key, name in new.items() if key != name for match in _AROUND_PARTS.findall(key)}
    return {new[key]: value for key, value in state.items()}, sorted(wrappers)


def _where(state: Iterable[str], known: Set[str]) -> str:
    """Give the prefix under which most of the network's keys lie, "" if they lie at the top or nowhere."""
    found: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in known:
                found[".".join([*parts[:i], ""]).lstrip(".")] += 1
    best = found.most_common(1)[0][1] if found else 0
    if best <= _A_FEW * len(known):
        return ""
    good = [prefix for prefix, count in found.items() if count >= _AS_GOOD * best]
    if "" in good or len(good) == 1:
        return "" if "" in good else good[0]
    one = repr(good[0])
    raise CheckpointError(
        f"the network lies in the file {len(good)} times, under {', '.join(good)}: save the weights of one, as torch.save("
        f"{{key.removeprefix({one}): value for key, value in state.items() if key.startswith({one})}}, 'weights.pth')"
    )
