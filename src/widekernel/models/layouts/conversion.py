"""Conversion of state dicts between the official layouts and ours."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from widekernel.errors import CheckpointError
from widekernel.layers.folding import is_folded
from widekernel.models.layouts.layout import Expected, Layout, State
from widekernel.models.layouts.nesting import nesting_of
from widekernel.models.layouts.registry import identify, layouts_of

HEAD_PREFIXES = ("head.fc.", "head.norm.", "norm_pre.")


@dataclass(frozen=True)
class Classifier:
    """Which keys of a network belong to its classifier, whatever its structure.

    Attributes:
        prefixes: beginnings of these keys; by default those of our networks: the head, but not its norm.
        linear: key of the weight, if the classifier is one linear layer.
    """

    prefixes: tuple[str, ...] = ("head.",)
    linear: str = "head.fc.weight"

    def owns(self, key: str) -> bool:
        """Return whether `key` belongs to the classifier."""
        return key.startswith(self.prefixes) and not key.startswith("head.norm.")

    def is_of_head(self, key: str) -> bool:
        """Return whether `key` belongs to the classifier or to the norms before it."""
        return key.startswith(HEAD_PREFIXES) or self.owns(key)


def classifier_of(model: nn.Module) -> Classifier:
    """Return which keys belong to the classifier: for a network of timm those that its `pretrained_cfg` names.

    A ResNet has the classifier `fc`, for example.
    """
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (named,) if isinstance(named, str) else tuple(named)
    if not names or all(name.split(".")[0] == "head" for name in names):
        return Classifier()
    return Classifier(tuple(f"{name}." for name in names), f"{names[0]}.weight")


@dataclass
class Converted:
    """A state dict in our layout, and its origin.

    Attributes:
        state: our key -> tensor.
        layout: family whose layout the file is in, or "native".
        source_keys: our key -> key in the file.
        unknown: keys of the file that no rule maps.
        note: what was converted in the process, or "".
        generated: our keys that the file lacks and that were generated as in the authors' code.
    """

    state: State
    layout: str
    source_keys: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    note: str = ""
    generated: tuple[str, ...] = ()


def to_native(model: nn.Module, state: State) -> Converted:
    """Convert a state dict, without container and prefixes, to the layout of `model`.

    Raises:
        CheckpointError: if it is in none of the layouts that the model can be loaded from.
    """
    own, nesting = model.state_dict(), nesting_of(model)
    if nesting.official and not any(key.startswith(nesting.official) for key in state):
        raise CheckpointError(
            f"the checkpoint has no weights named {nesting.official}…, so it does not hold a whole {type(model).__name__}: "
            f"load it into the backbone alone, network.{nesting.official.rstrip('.')}"
        )
    state = _apply_pruning_masks(state, own)
    theirs, ours = identify(state), identify(own)
    classifier = classifier_of(nesting.body)
    trunk = {key for key in own if not classifier.is_of_head(nesting.local(key))}
    if theirs == ours:
        if trunk & set(state):
            return _native(model, state, "")
        if not nesting.official and any(nesting.native + key in trunk for key in state):
            return _native(model, state, nesting.native)
    for layout in layouts_of(model):
        if theirs is not None and layout.family == theirs.name and layout.folded == is_folded(model):
            return _from_layout(layout, state, model)
    raise CheckpointError(_mismatch(model, own, state))


def _native(model: nn.Module, state: State, prefix: str) -> Converted:
    """Return a state dict in our layout, put under a prefix."""
    native = {f"{prefix}{key}": value for key, value in state.items()}
    tables = {key: table for key, table in seeded_tables(model).items() if key not in native}
    sources = {f"{prefix}{key}": key for key in state}
    return Converted({**native, **tables}, "native", sources, generated=tuple(tables))


def _apply_pruning_masks(state: State, own: State) -> State:
    """Replace the pairs `*_orig` and `*_mask` of `torch.nn.utils.prune` by their product, unless the network has them, too.

    Raises:
        CheckpointError: if the shapes of a pair differ.
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
    """Return the message that names the networks of the file and of the model, and says what to do."""
    theirs, ours = identify(state), identify(own)
    file_folded = theirs is not None and theirs.form == "folded"
    model_folded = ours is not None and ours.form == "folded"
    known = " or ".join(sorted({layout.family for layout in layouts_of(model)}))
    advice = "create the matching model"
    if model_folded and not file_folded:
        advice = "load the weights before folding the model"
    elif file_folded and not model_folded:
        advice = "fold the model before loading this file, or load the weights that it was folded from"
    return (
        f"the checkpoint holds {theirs.name if theirs else 'an unknown network'}, but the model is a "
        f"{type(model).__name__}{f' ({ours.name})' if ours else ''}"
        f"{f', which takes official weights of {known}' if known else ''}: {advice}. "
        f"First keys of the file: {', '.join(list(state)[:3]) or 'none'}"
    )


def to_official(model: nn.Module) -> State:
    """Return the weights of `model` in its first official layout, in the order of the authors' files.

    Raises:
        CheckpointError: if the network has no official code, or is folded and its official code has no such form.
    """
    layouts = layouts_of(model)
    if not layouts:
        raise CheckpointError(f"{type(model).__name__} has no official layout here: save with layout='native'")
    layout, out = layouts[0], {}
    tables = _generated_tables(layout, model)
    if is_folded(model) and not layout.folded:
        raise CheckpointError("the network is folded and has no place in an official layout: save with layout='native'")
    for key, value in model.state_dict().items():
        if layout.is_generated(key):
            if not torch.equal(value.cpu(), tables[key].cpu()):
                raise CheckpointError(
                    f"{key} is not the table that the official code of {layout.family} generates and leaves out of its "
                    "files: save with layout='native'"
                )
            continue
        found = layout.to_official(key)
        if found is None:
            raise CheckpointError(f"{key} has no place in the official layout of {layout.family}: save with layout='native'")
        out[found[0]] = found[1].to_official(value)
    return {key: out[key] for key in sorted(out, key=layout.position)} if layout.part_order else out


def known_keys(model: nn.Module) -> set[str]:
    """Return the keys that a network takes, in our layout and in the official ones; also those of a network inside it."""
    own, nesting = model.state_dict(), nesting_of(model)
    inner = set() if nesting.official else {nesting.local(key) for key in own}
    official = {found[0] for layout in layouts_of(model) for key in own if (found := layout.to_official(key))}
    return official | inner | own.keys()


def seeded_tables(model: nn.Module) -> State:
    """Return all tables of a network as generated by the authors' code, whatever the network's own tables are."""
    return {
        f"{prefix}.{name}".lstrip("."): table
        for prefix, module in model.named_modules()
        if hasattr(module, "seeded_tables")
        for name, table in module.seeded_tables().items()  # type: ignore[operator]
    }


def _generated_tables(layout: Layout, model: nn.Module) -> State:
    """Return the tables of a network that files in a layout lack. In a folded form, its architecture determines them."""
    if not layout.folded:
        return seeded_tables(model)
    return {key: value for key, value in model.state_dict().items() if layout.is_generated(key)}


def table_problems(model: nn.Module, state: State) -> list[str]:
    """Return what is wrong with the tables in a state dict in our layout, whose shapes must be those of the network."""
    problems = []
    for prefix, module in model.named_modules():
        if not hasattr(module, "table_problem"):
            continue
        keys = {name: f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
        # A missing table is reported elsewhere.
        if all(key in state for key in keys.values()):
            tables = {name: state[key].long() for name, key in keys.items()}
            found = ((key, module.table_problem(name, tables)) for name, key in keys.items())  # type: ignore[operator]
            problems += [f"{key} {problem}" for key, problem in found if problem]
    return problems


def _expected(layout: Layout, model: nn.Module) -> Expected:
    shapes, eps = {}, {}
    for key, value in model.state_dict().items():
        found = layout.to_official(key)
        if found is not None:
            shapes[found[0]] = tuple(found[1].to_official(value).shape)
            if key.endswith(".running_var"):
                eps[found[0].removesuffix(".running_var")] = float(model.get_submodule(key.rpartition(".")[0]).eps)  # type: ignore[arg-type]
    return Expected(shapes, eps)


def _from_layout(layout: Layout, state: State, model: nn.Module) -> Converted:
    note, expected, tables = "", _expected(layout, model), _generated_tables(layout, model)
    if layout.upgrade is not None:
        given = state
        state, note = layout.upgrade(given, expected)
        converted = {key: value for key, value in given.items() if key not in state}
        twice = [key for key in layout.upgrade(converted, expected)[0] if key in given and key not in converted]
        if twice:
            raise CheckpointError(f"the file holds weights twice, in two forms: remove one of {', '.join(twice)}")
    out: State = {}
    source_keys: dict[str, str] = {}
    unknown: list[str] = []
    for key, value in state.items():
        found = layout.to_native(key)
        if found is None:
            unknown.append(key)
        else:
            if found[0] in out:
                raise CheckpointError(
                    f"the file holds one weight twice, as {source_keys[found[0]]} and as {key}: remove one"
                )
            out[found[0]] = found[1].to_native(value)
            source_keys[found[0]] = key
    generated = tuple(key for key in tables if key not in out)
    out.update((key, tables[key]) for key in generated)
    return Converted(out, layout.family, source_keys, tuple(unknown), note, generated)
