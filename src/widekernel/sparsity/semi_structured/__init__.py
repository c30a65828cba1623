"""2:4 sparsity: at most two of four consecutive weights are not zero, which sparse matrix units run at up to twice the rate.

    controller = prepare(model, SemiStructuredConfig(method="magnitude"))   # masks in place; controller.report says where
    plain = convert(model)                                                  # a plain network with zeros
    save_sparse(plain, "network.safetensors")                               # half of the weights, and choices of 2.7 bits

Learned masks (`method="learned"`) freeze the weights; train `controller.parameters()` without weight decay, add
`controller.regularisation()` to the loss and call `controller.step()` after every optimizer step.
"""

from widekernel.sparsity.semi_structured.chains import Chain, find_chains
from widekernel.sparsity.semi_structured.controller import SemiStructured
from widekernel.sparsity.semi_structured.convert import convert, manifest_of, validate
from widekernel.sparsity.semi_structured.eligibility import LayerReport
from widekernel.sparsity.semi_structured.files import is_sparse_file, load_sparse, save_sparse
from widekernel.sparsity.semi_structured.grouping import (
    group_count,
    group_view,
    paper_padding,
    ungroup,
    valid_slots,
)
from widekernel.sparsity.semi_structured.hardware import Capability, PaddingPlan, plan_padding, probe
from widekernel.sparsity.semi_structured.learned import gumbel_mask, kept_share
from widekernel.sparsity.semi_structured.manifest import Manifest, MaskedWeight
from widekernel.sparsity.semi_structured.masks import (
    check_two_four,
    choices_to_mask,
    magnitude_choices,
    magnitude_mask,
    mask_to_choices,
)
from widekernel.sparsity.semi_structured.official import OfficialMasks, load_official
from widekernel.sparsity.semi_structured.patterns import PATTERNS
from widekernel.sparsity.semi_structured.permutation import kept_magnitude, search_permutation
from widekernel.sparsity.semi_structured.permute import Permuted, permute_channels
from widekernel.sparsity.semi_structured.prepare import prepare
from widekernel.sparsity.semi_structured.stability import LayerStability, StabilityReport, stability_report
from widekernel.sparsity.semi_structured.storage import decode, encode, pack_choices, unpack_choices
from widekernel.sparsity.semi_structured.transposable import transposable_mask
from widekernel.sparsity.two_four_config import AXES, Axis, SemiStructuredConfig

__all__ = [
    "AXES",
    "PATTERNS",
    "Axis",
    "Capability",
    "Chain",
    "LayerReport",
    "LayerStability",
    "Manifest",
    "MaskedWeight",
    "OfficialMasks",
    "PaddingPlan",
    "Permuted",
    "SemiStructured",
    "SemiStructuredConfig",
    "StabilityReport",
    "check_two_four",
    "choices_to_mask",
    "convert",
    "decode",
    "encode",
    "find_chains",
    "group_count",
    "group_view",
    "gumbel_mask",
    "is_sparse_file",
    "kept_magnitude",
    "kept_share",
    "load_official",
    "load_sparse",
    "magnitude_choices",
    "magnitude_mask",
    "manifest_of",
    "mask_to_choices",
    "pack_choices",
    "paper_padding",
    "permute_channels",
    "plan_padding",
    "prepare",
    "probe",
    "save_sparse",
    "search_permutation",
    "stability_report",
    "transposable_mask",
    "ungroup",
    "unpack_choices",
    "valid_slots",
    "validate",
]
