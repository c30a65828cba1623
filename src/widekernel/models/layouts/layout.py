"""Checkpoint layouts: ordered, invertible tables from official key names to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """One pair of key templates; `{i}`, `{j}`, `{k}` stand for numbers and `{rest}` for anything.

    Attributes:
        official: key in the authors' checkpoint.
        native: key in ours.
        official_dims: for vectors that the authors store with leading axes of length 1, how many axes there are.
    """

    official: str
    native: str
    official_dims: int | None = None

    def to_native(self, value: Tensor) -> Tensor:
        """Drop the leading axes of length 1 from an official tensor."""
        return value.flatten() if self.official_dims else value

    def to_official(self, value: Tensor) -> Tensor:
        """Put the leading axes back."""
        return value.view(*[1] * (self.official_dims - 1), -1) if self.official_dims else value


@dataclass(frozen=True)
class Wanted:
    """What the network asks of a state dict in a layout, by official key.

    Attributes:
        shapes: of the tensors.
        eps: what a batch norm adds to the variance, by the name of the norm.
    """

    shapes: Mapping[str, tuple[int, ...]]
    eps: Mapping[str, float]


@dataclass(frozen=True)
class Layout:
    """How the authors of a network name its weights.

    Attributes:
        family: name of the official network, one of those that `identify` gives.
        rules: tried in order, in both directions.
        generated: patterns of our keys that official files do not hold, because their code draws them anew.
        upgrade: turns other official forms (merged kernels, strips to be cut into tiles) into the one that the rules
            describe, given what the network wants; returns a note on what it did, or "".
    """

    family: str
    rules: tuple[Rule, ...]
    generated: tuple[str, ...] = ()
    upgrade: Callable[[State, Wanted], tuple[State, str]] | None = field(default=None, compare=False)

    def to_native(self, official: str) -> tuple[str, Rule] | None:
        """Translate an official key; None if no rule knows it."""
        for rule in self.rules:
            match = _pattern(rule.official).fullmatch(official)
            if match:
                return rule.native.format(**match.groupdict()), rule
        return None

    def to_official(self, native: str) -> tuple[str, Rule] | None:
        """Translate one of our keys; None if the layout has no place for it."""
        for rule in self.rules:
            match = _pattern(rule.native).fullmatch(native)
            if match:
                return rule.official.format(**match.groupdict()), rule
        return None

    def is_generated(self, native: str) -> bool:
        """Whether official files lack our key because it is drawn anew by their code."""
        return any(re.search(pattern, native) for pattern in self.generated)


_BLOCK = r"^stages\.\d+\.blocks\.\d+\."
FOLDED = "a folded"

# What gives a network away, most specific first: our folded forms, official and foreign networks, our training forms.
_SIGNATURES: tuple[tuple[str, str], ...] = (
    (f"{FOLDED} Shift-wise network", rf"{_BLOCK}mixer\.layer\.kernels\.\d+$"),
    (f"{FOLDED} SLaK", rf"{_BLOCK}mixer\.kernels\.\d+$"),
    (f"{FOLDED} RepLKNet", rf"{_BLOCK}large_kernel\.kernels\.\d+$"),
    (f"{FOLDED} widekernel network", r"(mixer|large_kernel|layer)\.kernels\.\d+$"),
    ("SLaK_pww", r"large_kernel\.LoRA\.split_convs\."),
    ("SLaK_reg", r"large_kernel\.LoRA[12]\.split_convs\."),
    ("SLaK", r"^stages\.\d+\.\d+\.large_kernel\.(LoRA[12]\.conv|lkb_origin|lkb_reparam)\."),
    ("ShiftWise_v2", r"^stages\.\d+\.\d+\.pwconv2\.2\."),
    ("ShiftWise_v1", r"large_kernel\.LoRAs?\.(\d+\.)?weight$"),
    ("RepLKNet", rf"{_BLOCK}large_kernel\.lkb_"),
    ("isotropic ConvNeXt", r"^blocks\.\d+\.dwconv\."),
    ("ConvNeXt", r"^stages\.\d+\.\d+\.dwconv\."),
    ("timm's ConvNeXt", r"^stages\.\d+\.blocks\.\d+\.conv_dw\."),
    ("torchvision's ConvNeXt", r"^features\.\d+\.\d+\.block\."),
    ("a ResNet", r"^layer\d\.\d+\.conv\d\."),
    ("a vision transformer", r"^blocks\.\d+\.attn\."),
    ("widekernel's ShiftWise_v2", rf"{_BLOCK}mlp\.norm\.weight$"),
    ("widekernel's ShiftWise_v1", rf"{_BLOCK}mixer\.layer\.source\."),
    ("widekernel's SLaK_reg", rf"{_BLOCK}mixer\.source\.sources\.0\.tall$"),
    ("widekernel's SLaK_pww", rf"{_BLOCK}mixer\.source\.sources\.0\.gates\."),
    ("widekernel's SLaK_pw", rf"{_BLOCK}mixer\.source\.sources\.0\.(source\.)?tiles$"),
    ("widekernel's SLaK", rf"{_BLOCK}mixer\.source\.kernels\."),
    ("widekernel's RepLKNet", rf"{_BLOCK}large_kernel\.source\."),
    ("a step of widekernel's roadmap", r"^stem\.0\.conv\.weight$"),
    ("widekernel's isotropic ConvNeXt", rf"{_BLOCK}mixer\.weight$"),
)


# In what order the authors' modules define their parts, which is the order in their files.
_ORDER = (
    *("stem", "downsample_layers", "blocks", "stages", "transitions"),
    *("gamma", "beta", "dwconv", "lkb_origin", "split_convs", "conv", "LoRA", "LoRA1", "LoRA2", "LoRAs", "small_conv"),
    *("lora1", "lora2", "bn", "bn_lora1", "bn_lora2", "bn_small", "preffn_bn", "pw1", "pw2", "large_kernel", "prelkb_bn"),
    *("norm", "down", "up", "se", "pwconv1", "act", "pwconv2", "head"),
    *("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
)


def official_order(key: str) -> tuple[int, ...]:
    """Sort official keys as the authors' files have them; their conversion of SLaK to SLaK_reg goes by position."""
    return tuple(int(part) if part.isdigit() else _ORDER.index(part) if part in _ORDER else -1 for part in key.split("."))


def identify(keys: Iterable[str]) -> str | None:
    """Name the network, official, foreign or ours, that a state dict with these keys belongs to, or None."""
    keys = list(keys)
    for family, pattern in _SIGNATURES:
        if any(re.search(pattern, key) for key in keys):
            return family
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    out = ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            out += re.escape(part)
        else:
            out += f"(?P<{part}>.+)" if part == "rest" else rf"(?P<{part}>\d+)"
    return re.compile(out)
