"""State dicts between the official layouts and ours."""

from __future__ import annotations

from dataclasses import dataclass, field

import timm.models
import torch
from torch import nn

from widekernel.errors import CheckpointError
from widekernel.layers.folding import is_folded
from widekernel.models.layouts import convnext
from widekernel.models.layouts.layout import FOLDED, Layout, State, Wanted, identify, official_order

HEAD = ("head.fc.", "head.norm.", "norm_pre.")


def is_classifier(key: str) -> bool:
    """Whether one of our keys belongs to the classifier, of whatever make: to the head, but not to the norm in it."""
    return key.startswith("head.") and not key.startswith("head.norm.")


@dataclass
class Translation:
    """A state dict in our layout.

    Attributes:
        state: our key -> tensor.
        layout: family whose layout it came in, or "native".
        official: our key -> key in the file.
        unknown: keys of the file that no rule knows.
        note: what was converted on the way, or "".
        generated: our keys that the file lacks and that were drawn anew, as the authors' code draws them.
    """

    state: State
    layout: str
    official: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    note: str = ""
    generated: tuple[str, ...] = ()


def layouts_of(model: nn.Module) -> tuple[Layout, ...]:
    """Give the official layouts that a network, ours or timm's ConvNeXt, can be loaded from."""
    if isinstance(model, timm.models.ConvNeXt):
        return (convnext.TIMM,)
    layouts = getattr(model, "layouts", None)
    return layouts() if callable(layouts) else ()


def translate(model: nn.Module, state: State) -> Translation:
    """Bring a state dict, without container and prefixes, into the layout of `model`.

    Raises:
        CheckpointError: if it is in no layout that the model can be loaded from.
    """
    own = model.state_dict()
    state = _unpruned(state, own)
    family = identify(state)
    for layout in layouts_of(model):
        if layout.family == family and not is_folded(model):
            return _translate(layout, state, model)
    backbone = {key for key in own if not key.startswith(HEAD) and not is_classifier(key)}
    if family == identify(own) and backbone & set(state):
        tables = {key: table for key, table in seeded_tables(model).items() if key not in state}
        return Translation({**state, **tables}, "native", {key: key for key in state}, generated=tuple(tables))
    raise CheckpointError(_mismatch(model, own, state))


def _unpruned(state: State, own: State) -> State:
    """Put masked weights in the place of the weights and masks that a pruned network keeps apart, if this one does not.

    Raises:
        CheckpointError: if the shapes of the two differ.
    """
    out = dict(state)
    for key in [key for key in state if key.endswith("_orig") and key not in own]:
        mask = f"{key.removesuffix('_orig')}_mask"
        if mask in state and mask not in own:
            shapes = [tuple(state[name].shape) for name in (key, mask)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"{key} has shape {shapes[0]} but {mask} has {shapes[1]}: a weight and its mask must have the same"
                )
            out[key.removesuffix("_orig")] = out.pop(key) * out.pop(mask)
    return out


def _mismatch(model: nn.Module, own: State, state: State) -> str:
    """Say which networks the file and the model are, and what to do."""
    theirs, ours = identify(state) or "an unknown network", identify(own)
    known = " or ".join(sorted({layout.family for layout in layouts_of(model)}))
    advice = "create the matching model"
    if (ours or "").startswith(FOLDED) and not theirs.startswith(FOLDED):
        advice = "load the weights before folding the model"
    elif theirs.startswith(FOLDED) and not (ours or "").startswith(FOLDED):
        advice = "fold the model before loading this file, or load the weights that it was folded from"
    return (
        f"the checkpoint holds {theirs}, but the model is a {type(model).__name__}{f' ({ours})' if ours else ''}"
        f"{f', which takes official weights of {known}' if known else ''}: {advice}. "
        f"First keys of the file: {', '.join(list(state)[:3]) or 'none'}"
    )


def to_official(model: nn.Module) -> State:
    """Give the weights of `model` in its first official layout, in the order of the authors' files.

    Raises:
        CheckpointError: if the network has no official code, or is folded.
    """
    layouts = layouts_of(model)
    if not layouts:
        raise CheckpointError(f"{type(model).__name__} has no official layout here: save with layout='native'")
    if is_folded(model):
        raise CheckpointError("the network is folded and has no place in an official layout: save with layout='native'")
    layout, out, tables = layouts[0], {}, seeded_tables(model)
    for key, value in model.state_dict().items():
        if layout.is_generated(key):
            if not torch.equal(value.cpu(), tables[key]):
                raise CheckpointError(
                    f"{key} is not the table that the official code of {layout.family} draws, which its files do not hold: "
                    "save with layout='native'"
                )
            continue
        found = layout.to_official(key)
        if found is None:
            raise CheckpointError(f"{key} has no place in the official layout of {layout.family}: save with layout='native'")
        out[found[0]] = found[1].to_official(value)
    return {key: out[key] for key in sorted(out, key=official_order)}


def known_keys(model: nn.Module) -> set[str]:
    """Give the keys that a network takes, in our layout and in the official ones."""
    own = model.state_dict()
    official = {found[0] for layout in layouts_of(model) for key in own if (found := layout.to_official(key))}
    return official | own.keys()


def seeded_tables(model: nn.Module) -> State:
    """Give all the tables of a network as the authors' code draws them, whatever the network's own are."""
    return {
        f"{prefix}.{name}".lstrip("."): table
        for prefix, module in model.named_modules()
        if hasattr(module, "seeded_tables")
        for name, table in module.seeded_tables().items()  # type: ignore[operator]
    }


def table_problems(model: nn.Module, state: State) -> list[str]:
    """List what is wrong with the tables in a state dict of ours, whose shapes must be those of the network."""
    problems = []
    for prefix, module in model.named_modules():
        if not hasattr(module, "table_problem"):
            continue
        keys = {name: f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
        # What is not there has been named already.
        if all(key in state for key in keys.values()):
            tables = {name: state[key].long() for name, key in keys.items()}
            found = ((key, module.table_problem(name, tables)) for name, key in keys.items())  # type: ignore[operator]
            problems += [f"{key} {problem}" for key, problem in found if problem]
    return problems


def _wanted(layout: Layout, model: nn.Module) -> Wanted:
    shapes, eps = {}, {}
    for key, value in model.state_dict().items():
        found = layout.to_official(key)
        if found is not None:
            shapes[found[0]] = tuple(found[1].to_official(value).shape)
            if key.endswith(".running_var"):
                eps[found[0].removesuffix(".running_var")] = float(model.get_submodule(key.rpartition(".")[0]).eps)  # type: ignore[arg-type]
    return Wanted(shapes, eps)


def _translate(layout: Layout, state: State, model: nn.Module) -> Translation:
    note, wanted, tables = "", _wanted(layout, model), seeded_tables(model)
    if layout.upgrade is not None:
        given = state
        state, note = layout.upgrade(given, wanted)
        converted = {key: value for key, value in given.items() if key not in state}
        twice = [key for key in layout.upgrade(converted, wanted)[0] if key in given]
        if twice:
            raise CheckpointError(f"the file holds weights twice, in two forms: remove one of {', '.join(twice)}")
    out: State = {}
    origin: dict[str, str] = {}
    unknown: list[str] = []
    for key, value in state.items():
        found = layout.to_native(key)
        if found is None:
            unknown.append(key)
        else:
            if found[0] in out:
                raise CheckpointError(f"the file holds one weight twice, as {origin[found[0]]} and as {key}: remove one")
            out[found[0]] = found[1].to_native(value)
            origin[found[0]] = key
    generated = tuple(key for key in tables if key not in out)
    out.update((key, tables[key]) for key in generated)
    return Translation(out, layout.family, origin, tuple(unknown), note, generated)
