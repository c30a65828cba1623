"""Loading and saving checkpoints in every official layout and in our own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from widekernel.errors import ArgumentError, CheckpointError
from widekernel.files import replace_atomically
from widekernel.models.layouts import containers
from widekernel.models.layouts.layout import State
from widekernel.models.layouts.prefixes import strip_prefixes
from widekernel.models.layouts.translate import (
    HEAD,
    Translation,
    is_classifier,
    known_keys,
    table_problems,
    to_official,
    translate,
)

# Where wrappers keep the network: compiled, fully sharded, data-parallel and averaged ones.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "module")
# Parts of keys that the network lacks, and what to do about them; the first that fits is given.
_REMEDIES = {
    (".parametrizations.weight.0.logits$",): (
        "the file is of a network whose 2:4 masks are being learned: save it after "
        "widekernel.sparsity.semi_structured.convert, or prepare this network alike before loading"
    ),
    (".parametrizations.",): (
        "the file is of a network with parametrised weights: call torch.nn.utils.parametrize.remove_parametrizations on "
        "its layers before saving it, or parametrise this network alike before loading"
    ),
    (".weight_g$", ".weight_v$"): (
        "the file is of a network with weight normalisation: call torch.nn.utils.remove_weight_norm on its layers before "
        "saving it, or normalise this network alike before loading"
    ),
    (".weight_orig$", ".weight_u$"): (
        "the file is of a network with spectral normalisation: call torch.nn.utils.remove_spectral_norm on its layers "
        "before saving it, or normalise this network alike before loading"
    ),
}
_PLAIN = "head.fc.weight"  # of a classifier that is one linear layer


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from a checkpoint, and what was not.

    Attributes:
        path: the file.
        container: entry of the file that the weights were in; "" for a bare state dict.
        layout: family whose layout they were in, or "native".
        loaded: our keys that were filled.
        dropped: weights of a classifier for other classes or of another make, left out; named as in the file.
        missing: our keys that the file does not hold (the head of a backbone checkpoint), left as they were.
        ignored: keys of the file that belong to other parts of a larger network, or to stages that were taken off this one.
        generated: tables that the file does not hold; they were drawn anew, as the authors' code does.
        unused: entries of the file that are no weights of a network, such as the optimizer's state.
        notes: prefixes removed, kernels converted, precision lost.
    """

    path: str
    container: str
    layout: str
    loaded: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    generated: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" ({self.container})" if self.container else ""
        lines = [f"{self.path}{where}: {len(self.loaded)} tensors in the layout {self.layout}"]
        for what in ("dropped", "missing", "ignored", "generated", "unused"):
            keys = getattr(self, what)
            if keys:
                lines.append(f"  {what} ({len(keys)}): {', '.join(keys)}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def load_checkpoint(model: nn.Module, path: str | Path, weights: Literal["model", "ema"] = "model") -> LoadReport:
    """Load a checkpoint into `model`, whatever official container and layout it is in.

    Takes training checkpoints, bare state dicts, those of wrapped models and of larger networks with this one as a part,
    safetensors, also in shards; the official layouts of the model's family, merged forms included, and our own. Nothing in
    the file is executed: what it holds beside the weights may be of any class of any package, none of which is looked up. Of
    the standard library it may be any value; a file is refused that names what can run something (`os.system`, or
    `builtins.getattr`, which a bound method needs too). A classifier of another number of classes or of another make (a
    `Sequential` in its place, say) is left out, as fine-tuning needs it, with a warning; a head that the file lacks stays
    as it is. Anything else that does not fit raises, and the model is left untouched.

    Args:
        model: one of our networks, also in its `features_only` form, or timm's ConvNeXt; compiled, data-parallel
            and averaging (EMA, SWA) wrappers are seen through.
        path: of the file; `~` stands for the home folder.
        weights: "model", or "ema" for the averaged weights of a training checkpoint.

    Raises:
        ArgumentError: if `model` is no network or `path` no path.
        CheckpointError: if the file cannot be read safely, holds another network, or does not fill the model; the message
            names every key.
    """
    network, path = _inner(model), _checked(path)
    container = containers.read(path, weights)
    translation, prefixes, others = _translated(network, container.state, path)
    is_backbone = any(f".{prefix}".endswith(".backbone.") for prefix in prefixes)
    own = network.state_dict()
    plan = _plan(own, translation, is_backbone, _removed_parts(network))
    _refuse(path, network, plan.problems + table_problems(network, plan.accepted))
    try:
        network.load_state_dict({**own, **plan.accepted})
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the {type(network).__name__}: {error}") from error
    notes = [f"removed the prefix {prefix!r}" for prefix in prefixes]
    notes += [translation.note] if translation.note else []
    notes += [f"converted {', '.join(sorted(plan.converted))}"] if plan.converted else []
    report = LoadReport(
        path=str(path),
        container=container.found_in,
        layout=translation.layout,
        loaded=tuple(key for key in plan.accepted if key not in translation.generated),
        dropped=tuple(plan.dropped),
        missing=tuple(plan.missing),
        ignored=(*others, *plan.ignored),
        generated=translation.generated,
        unused=container.others,
        notes=tuple(notes),
    )
    warning = _classifier_warning(report, network, plan.why_dropped)
    if warning:
        warnings.warn(warning, stacklevel=2)
    return report


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    layout: Literal["native", "official"] = "native",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Save the weights of `model`, whole or not at all.

    Weights are saved as they are. A moving average is as sparse as the network only if `DynamicSparsity` was given it
    (`averages=`).

    Args:
        model: the network, or its `features_only` form.
        path: ends in `.safetensors` for layout "native", in `.pth` or `.pt` for "official".
        layout: "native" for our own names, "official" for those of the authors' code, which can then load the file.
        metadata: JSON-able values to keep in a safetensors file.

    Raises:
        ArgumentError: if `model` is no network or `path` no path.
        CheckpointError: if the suffix does not fit, the layout has no place for a weight, or the file cannot be written.
    """
    path = _checked(path)
    suffixes = {"native": (".safetensors",), "official": (".pth", ".pt")}
    if layout not in suffixes:
        raise CheckpointError(f"layout {layout!r} is unknown: it must be 'native' or 'official'")
    if path.suffix not in suffixes[layout]:
        raise CheckpointError(f"{path} must end in {' or '.join(suffixes[layout])} for layout {layout!r}")
    if layout == "official":
        if metadata:
            raise CheckpointError("the official layout has no place for metadata: save with layout='native'")
        state = {key: value.detach().cpu() for key, value in to_official(_inner(model)).items()}
        return _write(path, lambda file: torch.save({"model": state}, file))
    native = {key: value.detach().cpu() for key, value in _inner(model).state_dict().items()}
    # Views and shared storage are made whole: safetensors writes each tensor by itself.
    native = {key: value.clone(memory_format=torch.contiguous_format) for key, value in native.items()}
    header = {"widekernel": json.dumps(dict(metadata), sort_keys=True)} if metadata else None
    return _write(path, lambda file: save_file(native, file, metadata=header))


def _translated(network: nn.Module, state: State, path: Path) -> tuple[Translation, tuple[str, ...], tuple[str, ...]]:
    """Bring the weights of a file into our layout; give the prefixes removed and the keys outside of them, too."""
    try:
        inside, prefixes, others = strip_prefixes(state, known_keys(network))
        problems = [f"{key} {problem}" for key, value in inside.items() if (problem := _storage_problem(value))]
        translation = None if problems else translate(network, inside)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from None
    _refuse(path, network, problems)
    assert translation is not None
    return translation, prefixes, others


def _checked(path: Any) -> Path:
    """Give the path of a file, with `~` put in full.

    Raises:
        ArgumentError: if it is none.
    """
    try:
        return Path(path).expanduser()
    except TypeError:
        raise ArgumentError(
            f"path is a {type(path).__name__}: it must be the path of a file, as a str or Path. Load a state dict that is "
            "in memory with model.load_state_dict(state), or write it to a file with torch.save"
        ) from None


def _inner(model: nn.Module) -> nn.Module:
    """Give the network within wrappers: timm's that hands out feature maps, compiled, data-parallel and averaged modules."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}: it must be an nn.Module, and the path comes second")
    while True:
        if isinstance(model, FeatureGetterNet):
            model = model.model  # type: ignore[assignment]
            continue
        inner = next((name for name in _WRAPPED if isinstance(model._modules.get(name), nn.Module)), "")
        if not inner or (inner == "module" and len(model._modules) > 1):
            return model
        model = model._modules[inner]  # type: ignore[assignment]


def _refuse(path: str | Path, network: nn.Module, problems: Sequence[str]) -> None:
    """Raise if there are problems, with all of them."""
    if problems:
        raise CheckpointError(
            f"{path} does not fit the {type(network).__name__}; nothing was loaded:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


def _removed_parts(network: nn.Module) -> tuple[str, ...]:
    """Give the key prefixes of the stages, and of the norms of their maps, that a shortened network no longer has."""
    stages, described = getattr(network, "stages", ()), getattr(network, "feature_info", ())
    norms: Any = getattr(network, "feature_norms", ())
    removed = [f"stages.{i}." for i in range(len(stages), len(described))]
    return (*removed, *(f"feature_norms.{i}." for i, norm in enumerate(norms) if isinstance(norm, nn.Identity)))


@dataclass
class _Plan:
    accepted: dict[str, Tensor]
    dropped: list[str]
    missing: list[str]
    ignored: list[str]
    problems: list[str]
    why_dropped: str = ""
    converted: set[str] = field(default_factory=set)


def _plan(own: Mapping[str, Tensor], translation: Translation, is_backbone: bool, removed: tuple[str, ...]) -> _Plan:
    """Sort the tensors of the file into those to load, those to leave out, and those that are an error."""
    plan = _Plan({}, [], [], list(translation.unknown) if is_backbone else [], [])
    if not is_backbone:
        plan.problems += [f"{key}: the network has no such weight" for key in translation.unknown]
    wrong_classifier = _classifier_mismatch(own, translation.state)
    headless = not any(map(is_classifier, own))
    for key, value in translation.state.items():
        name = translation.official.get(key, key)
        if is_classifier(key) and (wrong_classifier or headless):
            plan.dropped.append(name)
            plan.why_dropped = wrong_classifier
        elif key.startswith(removed):
            plan.ignored.append(name)
        elif key not in own:
            # A headless feature extractor has no use for the final norm either.
            if key.startswith(HEAD) and not any(k.startswith(HEAD) for k in own):
                plan.dropped.append(name)
            else:
                plan.problems.append(f"{name}: the network has no such weight")
        elif value.shape != own[key].shape:
            plan.problems.append(f"{name} has shape {tuple(value.shape)} but the network's is {tuple(own[key].shape)}")
        elif problem := _type_problem(value, own[key]):
            plan.problems.append(f"{name} {problem}")
        else:
            plan.accepted[key] = value
            if value.dtype != own[key].dtype:
                plan.converted.add(f"{value.dtype} to {own[key].dtype}".replace("torch.", ""))
    _find_missing(own, translation, plan, bool(wrong_classifier))
    if plan.problems:
        plan.problems += _remedies(own, translation.unknown or translation.state)
    return plan


def _remedies(own: Mapping[str, Tensor], keys: Iterable[str]) -> list[str]:
    """Say what to do where a file has weights in a form that the network does not."""
    foreign = [key for key in keys if key not in own]
    return [remedy for parts, remedy in _REMEDIES.items() if all(any(p in f"{key}$" for key in foreign) for p in parts)][:1]


def _storage_problem(value: Tensor) -> str:
    """Say why a tensor of a file cannot be worked with at all, "" if it can."""
    if value.is_meta:
        return "has a shape but no data in the file"
    return "" if value.layout is torch.strided else f"is stored as {value.layout}, the network's is dense"


def _type_problem(value: Tensor, own: Tensor) -> str:
    """Say why a tensor of a file cannot be copied into one of the network, "" if it can."""
    if own.is_meta:
        return "has nowhere to go: the network was made without data; call model.to_empty(device=...) first"
    kinds = [(t.dtype.is_floating_point, t.dtype.is_complex) for t in (value, own)]
    return "" if kinds[0] == kinds[1] else f"has type {value.dtype} but the network's is {own.dtype}"


def _find_missing(own: Mapping[str, Tensor], translation: Translation, plan: _Plan, wrong_classifier: bool) -> None:
    headless = not any(map(is_classifier, translation.state))
    for key in own:
        if key in translation.state or key in translation.generated:
            continue
        of_head = headless and (key.startswith(HEAD) or is_classifier(key))
        if key.endswith("num_batches_tracked") or of_head or (wrong_classifier and is_classifier(key)):
            plan.missing.append(key)
        else:
            plan.problems.append(f"{key}: the file holds no such weight")


def _classifier_warning(report: LoadReport, network: nn.Module, why_dropped: str) -> str:
    """Say why the network's classifier was left untrained, "" if it was not or there is none."""
    if not any(map(is_classifier, network.state_dict())):
        return ""
    if report.dropped:
        return f"{', '.join(report.dropped)} of {report.path} were left out: {why_dropped}; the classifier is untrained"
    if any(map(is_classifier, report.missing)):
        return f"{report.path} holds no classifier: the network's is untrained"
    return ""


def _classifier_mismatch(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Say how the classifiers differ, "" if they do not, or if one of the two has none.

    A plain one that reads features of another width is no other classifier but another network.
    """
    theirs, ours = ({key: value for key, value in each.items() if is_classifier(key)} for each in (state, own))
    if not theirs or not ours:
        return ""
    if _PLAIN in theirs and _PLAIN in ours:
        a, b = theirs[_PLAIN].shape, ours[_PLAIN].shape
        return "" if a == b or a[1:] != b[1:] else f"they are for {a[0]} classes, the network has {b[0]}"
    if theirs.keys() != ours.keys():
        return f"they are of another make than the network's ({', '.join(ours)})"
    different = [key for key in ours if theirs[key].shape != ours[key].shape]
    return (
        f"{different[0]} has shape {tuple(theirs[different[0]].shape)}, the network's {tuple(ours[different[0]].shape)}"
        if different
        else ""
    )


def _write(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write a file, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, write)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    return path
