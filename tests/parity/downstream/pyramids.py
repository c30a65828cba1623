"""Our feature pyramid for the official backbone of a case, with its weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from tests.parity.downstream.arrays import Golden
from tests.parity.reference import NAMES, arguments
from widekernel.dense.backbone import Pyramid, build_pyramid
from widekernel.models.layouts.conversion import to_native, to_official

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def official_pyramid(golden: Golden, out_indices: Sequence[int] = (0, 1, 2, 3)) -> Pyramid:
    """Build the pyramid of a case and load its weights, each of which must be used."""
    config = dict(golden.manifest["config"]["backbone"])
    kind = config.pop("type")
    config.pop("num_classes", None)
    config.pop("sparse", None)
    if "LoRA" in config:
        config["Decom"] = config.pop("LoRA")
    wanted = arguments(kind, config)
    if kind == "ConvNeXt":
        wanted["ls_init_value"] = wanted.pop("layer_scale")
    pyramid = build_pyramid(NAMES[kind], wanted, out_indices)
    state = golden.weights("backbone.")
    norms = {key.removeprefix("norm"): state.pop(key) for key in list(state) if key.startswith("norm")}
    pyramid.body.load_state_dict(to_native(pyramid.body, state).state)
    pyramid.norms.load_state_dict(norms)
    return pyramid


def official_gradients(detector: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a detector's parameters under their official names."""
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters() if not name.startswith("backbone.")}
    body = copy.deepcopy(detector.backbone.body)
    for copied, parameter in zip(body.parameters(), detector.backbone.body.parameters()):
        copied.data = parameter.grad
    buffers = {key for key in to_official(body) if key.rsplit(".", 1)[-1] in BUFFERS}
    gradients |= {f"backbone.{key}": value for key, value in to_official(body).items() if key not in buffers}
    norms = detector.backbone.norms.named_parameters()
    return gradients | {f"backbone.norm{name}": parameter.grad for name, parameter in norms}


def check_gradients(golden: Golden, gradients: dict[str, Tensor], relative: float, chosen: str = "") -> None:
    """Compare norms of all gradients whose name contains `chosen`, and whole gradients where they are stored."""
    norms = dict(zip(golden.arrays["grad_names"].tolist(), golden.arrays["grad_norms"].tolist()))
    names = [name for name in norms if chosen in name]
    assert names
    floor = 0.01 * max(norms.values())
    for name in names:
        wanted = norms[name]
        error = abs(gradients[name].norm().item() - wanted)
        assert error <= relative * max(wanted, floor), f"{name}: {gradients[name].norm().item()} instead of {wanted}"
        stored = {f"grad:{name}", f"grad:{name}|shape"} & set(golden.arrays)
        if stored:
            golden.check(f"grad:{name}", gradients[name], 0.0, relative * max(wanted, floor))
