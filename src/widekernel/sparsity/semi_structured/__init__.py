"""2:4 sparsity: at most two of four consecutive weights are nonzero, and sparse matrix units run up to twice as fast.

    controller = prepare(model, SemiStructuredConfig(method="magnitude"))  # masks in place; controller.report lists layers
    plain = convert(model)  # a plain network with zeros
    save_sparse(plain, "network.safetensors")  # half of the weights, and 2.7 bits for each group of four

Learned masks (`method="learned"`) freeze the weights: train `controller.parameters()` without weight decay, add
`controller.regularization()` to the loss and call `controller.step()` after every optimizer step.
"""

from typing import TYPE_CHECKING

from widekernel.lazy import attach

if TYPE_CHECKING:
    from widekernel.sparsity.semi_structured.config import SemiStructuredConfig
    from widekernel.sparsity.semi_structured.controller import SemiStructured
    from widekernel.sparsity.semi_structured.conversion import convert, manifest_of, validate
    from widekernel.sparsity.semi_structured.eligibility import LayerReport
    from widekernel.sparsity.semi_structured.hardware import HardwareSupport, hardware_support
    from widekernel.sparsity.semi_structured.manifest import Manifest
    from widekernel.sparsity.semi_structured.masks import magnitude_mask
    from widekernel.sparsity.semi_structured.official import OfficialMasks, load_official
    from widekernel.sparsity.semi_structured.preparation import prepare
    from widekernel.sparsity.semi_structured.serialization import is_sparse_file, load_sparse, save_sparse
    from widekernel.sparsity.semi_structured.stability import StabilityReport, stability_report
    from widekernel.sparsity.semi_structured.transposable import transposable_mask

__all__ = [
    "HardwareSupport",
    "LayerReport",
    "Manifest",
    "OfficialMasks",
    "SemiStructured",
    "SemiStructuredConfig",
    "StabilityReport",
    "convert",
    "hardware_support",
    "is_sparse_file",
    "load_official",
    "load_sparse",
    "magnitude_mask",
    "manifest_of",
    "prepare",
    "save_sparse",
    "stability_report",
    "transposable_mask",
    "validate",
]

_HERE = "widekernel.sparsity.semi_structured"
_WHERE = {
    "HardwareSupport": f"{_HERE}.hardware",
    "LayerReport": f"{_HERE}.eligibility",
    "Manifest": f"{_HERE}.manifest",
    "OfficialMasks": f"{_HERE}.official",
    "SemiStructured": f"{_HERE}.controller",
    "SemiStructuredConfig": f"{_HERE}.config",
    "StabilityReport": f"{_HERE}.stability",
    "convert": f"{_HERE}.conversion",
    "hardware_support": f"{_HERE}.hardware",
    "is_sparse_file": f"{_HERE}.serialization",
    "load_official": f"{_HERE}.official",
    "load_sparse": f"{_HERE}.serialization",
    "magnitude_mask": f"{_HERE}.masks",
    "manifest_of": f"{_HERE}.conversion",
    "prepare": f"{_HERE}.preparation",
    "save_sparse": f"{_HERE}.serialization",
    "stability_report": f"{_HERE}.stability",
    "transposable_mask": f"{_HERE}.transposable",
    "validate": f"{_HERE}.conversion",
}
# Public up to version 0.4; a name after the colon is the new one.
_MOVED = {
    "AXES": f"{_HERE}.config",
    "Axis": f"{_HERE}.config",
    "Capability": f"{_HERE}.hardware:HardwareSupport",
    "Chain": f"{_HERE}.chains",
    "LayerStability": f"{_HERE}.stability",
    "MaskedWeight": f"{_HERE}.manifest",
    "PATTERNS": f"{_HERE}.patterns",
    "PaddingPlan": f"{_HERE}.hardware",
    "Permuted": f"{_HERE}.channel_permutation",
    "check_two_four": f"{_HERE}.masks:check_semi_structured",
    "choices_to_mask": f"{_HERE}.masks",
    "decode": f"{_HERE}.encoding",
    "encode": f"{_HERE}.encoding",
    "find_chains": f"{_HERE}.chains",
    "group_count": f"{_HERE}.grouping",
    "group_view": f"{_HERE}.grouping",
    "gumbel_mask": f"{_HERE}.learned",
    "kept_magnitude": f"{_HERE}.permutation_search",
    "kept_share": f"{_HERE}.learned",
    "magnitude_choices": f"{_HERE}.masks",
    "mask_to_choices": f"{_HERE}.masks",
    "pack_choices": f"{_HERE}.encoding",
    "paper_padding": f"{_HERE}.grouping",
    "permute_channels": f"{_HERE}.channel_permutation",
    "plan_padding": f"{_HERE}.hardware",
    "probe": f"{_HERE}.hardware:hardware_support",
    "search_permutation": f"{_HERE}.permutation_search",
    "ungroup": f"{_HERE}.grouping",
    "unpack_choices": f"{_HERE}.encoding",
    "valid_slots": f"{_HERE}.grouping",
}
__getattr__, __dir__ = attach(__name__, _WHERE, _MOVED)
