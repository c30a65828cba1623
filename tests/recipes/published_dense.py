"""What published segmentation and detection runs have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IMAGES = {"ADE20K": 20_210, "Cityscapes": 2_975, "COCO": 117_266}
"""Training images; of COCO, those with an object."""

CONVNEXT: dict[str, Any] = {"ls_init_value": 1.0}
SLAK: dict[str, Any] = {
    "kernel_sizes": [51, 49, 47, 13],
    "small_kernel": 5,
    "width_factor": 1.3,
    "layer_scale": 1.0,
}
SHIFTWISE: dict[str, Any] = {
    "kernel_sizes": [51, 49, 47, 13],
    "small_kernel": 3,
    "width_factor": 1.0,
    "ghost_ratio": 0.23,
    "paths": 2,
    "groups": 4,
    "layer_scale": 1.0,
}
NORMED: dict[str, Any] = {"norm_intermediate_features": True}


@dataclass(frozen=True)
class Dense:
    """A published run.

    Attributes:
        model: name of the backbone here.
        start: weights to start from.
        devices: nodes, GPUs of each, images per GPU.
        drop_path: rate of the deepest block.
        lr: learning rate.
        published: results in percent.
        checkpoint: name of the weights that came out.
        layers: factor of the learning rate from one layer group to the next, and the groups; `None` for one rate, and decay
            of all parameters but those of batch norms.
        args: arguments of the backbone besides the drop path rate.
        fp16: whether mixed precision was used.
        fixed_zeros: whether the zeros at the start stay zeros.
        mean: mean and standard deviation of normalization, if they are not those of ImageNet.
        response_norms: whether the vectors of response norms decay, too.
        checkpointing: whether activations are computed again in the backward pass.
        ema: whether weights are averaged.
        size: row of `params_flops.json` with the published network.
    """

    model: str
    start: str
    devices: tuple[int, int, int]
    drop_path: float
    lr: float
    published: dict[str, float] | None = None
    checkpoint: str | None = None
    layers: tuple[float, str] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    fp16: bool = False
    fixed_zeros: bool = False
    mean: float | None = None
    response_norms: bool = False
    checkpointing: bool = False
    ema: bool = False
    size: str | None = None

    @property
    def total(self) -> int:
        nodes, gpus, batch = self.devices
        return nodes * gpus * batch
