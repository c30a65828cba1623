"""Loading of checkpoints in every official layout and in our own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from widekernel.errors import CheckpointError
from widekernel.models.checkpoint.arguments import unwrap
from widekernel.models.checkpoint.by_name import describe_input, locate
from widekernel.models.checkpoint.channels import adapt_channels
from widekernel.models.checkpoint.matching import match_weights, storage_problem
from widekernel.models.checkpoint.prefixes import strip_prefixes
from widekernel.models.checkpoint.reader import read_checkpoint
from widekernel.models.checkpoint.report import LoadReport
from widekernel.models.layouts.conversion import Converted, is_classifier_key, known_keys, table_problems, to_native
from widekernel.models.layouts.layout import State
from widekernel.models.layouts.nesting import Nesting, nesting_of
from widekernel.models.layouts.registry import rewritten


def load_checkpoint(model: nn.Module, path: str | Path, weights: Literal["model", "ema"] = "model") -> LoadReport:
    """Load a checkpoint into `model`, in any official container and layout.

    In place of a path, the name of a published checkpoint can be given, such as "replknet_31b.in1k_224". Its file is fetched
    if it is not in the cache, and `model.pretrained_cfg` then says how the images are prepared. A file of that name comes
    first.

    The file may be a training checkpoint or a bare state dict, of the network, of a wrapped network or of a larger network
    that contains this one. It may be in safetensors format, and it may consist of shards. It may be in an official layout of
    the model's family, merged forms included, or in our own.

    Nothing in the file is executed. In addition to the weights, it may contain objects of any class of any package; none of
    these packages is imported. It may contain any value of the standard library, but a file that names something that can
    run code is rejected (`os.system`, or `builtins.getattr`, which bound methods also need).

    A network for dense prediction takes the authors' files of the whole network, merged kernels included. Its backbone alone
    takes these files, too, and those of classification networks: their classifier is left out, and the norms of the feature
    maps keep their values.

    A classifier for another number of classes or with another structure (such as a `Sequential`) is skipped with a warning,
    as needed for fine-tuning. A head that the file lacks keeps its values. Any other mismatch raises an error, and the model
    is left untouched.

    Args:
        model: one of our networks, also in its `features_only` form, or timm's ConvNeXt; a feature pyramid of one of them,
            or a network for dense prediction on such a pyramid. It may be inside compiled, data-parallel and averaging
            (EMA, SWA) wrappers.
        path: path of the file, where `~` means the home folder; or the name of a published checkpoint.
        weights: "model", or "ema" for the averaged weights of a training checkpoint.

    Raises:
        ArgumentError: if `model` is not a network or `path` not a path.
        CheckpointError: if the file cannot be read safely, holds another network, or does not fill the model; the message
            names every key.
        FetchError: if a published checkpoint cannot be fetched.
    """
    network = unwrap(model)
    path, published = locate(path, network)
    report, why_dropped = _load(network, path, weights)
    if published is not None:
        body = nesting_of(network).body
        for described in (model, network) if body is network else (body,):
            describe_input(described, published)
    warning = _classifier_warning(report, network, why_dropped)
    if warning:
        warnings.warn(warning, stacklevel=2)
    return report


def load_pretrained(network: nn.Module, path: str | Path) -> None:
    """Load a checkpoint as timm loads pretrained weights.

    The first convolution is adapted to the number of channels, and a classifier for other classes is left out without a
    warning.

    Args:
        network: one of our networks, with timm's `pretrained_cfg`.
        path: path of the file.

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """
    _load(network, Path(path), "model", adapt=True)


def _load(network: nn.Module, path: Path, weights: str, adapt: bool = False) -> tuple[LoadReport, str]:
    """Load a file; return the report, and how its classifier differs from that of the network."""
    content = read_checkpoint(path, weights)
    state, library = rewritten(content.state)
    converted, prefixes, others = _convert(network, state, path)
    is_backbone = any(f".{prefix}".endswith(".backbone.") for prefix in prefixes)
    own, nesting = network.state_dict(), nesting_of(network)
    if adapt:
        adapt_channels(network, converted.state)
    match = match_weights(own, converted, is_backbone, _removed_prefixes(nesting), nesting)
    _raise_problems(path, network, match.problems + table_problems(network, match.accepted))
    try:
        network.load_state_dict({**own, **match.accepted})
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the {type(network).__name__}: {error}") from error
    notes = [f"renamed the weights of {library}"] if library else []
    notes += [f"removed the prefix {prefix!r}" for prefix in prefixes]
    notes += [converted.note] if converted.note else []
    notes += [f"converted {', '.join(sorted(match.conversions))}"] if match.conversions else []
    report = LoadReport(
        path=str(path),
        container=content.found_in,
        layout=converted.layout,
        loaded=tuple(key for key in match.accepted if key not in converted.generated),
        dropped=tuple(match.dropped),
        missing=tuple(match.missing),
        ignored=(*others, *match.ignored),
        generated=converted.generated,
        unused=content.others,
        notes=tuple(notes),
    )
    return report, match.why_dropped


def _convert(network: nn.Module, state: State, path: Path) -> tuple[Converted, tuple[str, ...], tuple[str, ...]]:
    """Convert the weights of a file to our layout; also return the removed prefixes and the keys without them."""
    try:
        inside, prefixes, others = strip_prefixes(state, known_keys(network))
        problems = [f"{key} {problem}" for key, value in inside.items() if (problem := storage_problem(value))]
        converted = None if problems else to_native(network, inside)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from None
    _raise_problems(path, network, problems)
    assert converted is not None
    return converted, prefixes, others


def _raise_problems(path: Path, network: nn.Module, problems: Sequence[str]) -> None:
    """Raise an error that lists the problems, if there are any."""
    if problems:
        raise CheckpointError(
            f"{path} does not fit the {type(network).__name__}; nothing was loaded:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


def _removed_prefixes(nesting: Nesting) -> tuple[str, ...]:
    """Return the key prefixes of the stages, and of their norms, that a network for some of the stages lacks."""
    stages, described = getattr(nesting.body, "stages", ()), getattr(nesting.body, "feature_info", ())
    norms: Any = getattr(nesting.body, "feature_norms", ())
    removed = [f"stages.{i}." for i in range(len(stages), len(described))]
    removed += [f"feature_norms.{i}." for i, norm in enumerate(norms) if isinstance(norm, nn.Identity)]
    return (*nesting.removed, *(f"{nesting.native}{prefix}" for prefix in removed))


def _classifier_warning(report: LoadReport, network: nn.Module, why_dropped: str) -> str:
    """Return why the network's classifier is untrained; "" if it was loaded or there is none."""
    if not any(map(is_classifier_key, network.state_dict())):
        return ""
    if report.dropped:
        return f"{', '.join(report.dropped)} of {report.path} were left out: {why_dropped}; the classifier is untrained"
    if any(map(is_classifier_key, report.missing)):
        return f"{report.path} holds no classifier: the network's is untrained"
    return ""
