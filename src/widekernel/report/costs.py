"""Section on complexity: parameters and operations of each form, and what compaction removes from each layer."""

from __future__ import annotations

from dataclasses import dataclass

from widekernel.analysis.complexity import Complexity, complexity
from widekernel.errors import WidekernelError
from widekernel.report.conversion import quietly
from widekernel.report.masks import FEWEST
from widekernel.report.parts import Missing, ReportOptions
from widekernel.report.subject import Subject
from widekernel.transforms.compaction import compact_report
from widekernel.transforms.compaction.report import LayerReport


@dataclass(frozen=True)
class Costs:
    """Complexity of a network.

    Attributes:
        counted: parameters, multiply-accumulates and activations of all forms for one image.
        layers: what compaction does with each layer that has zeros or a large kernel; () if hardly any weight is zero.
    """

    counted: Complexity
    layers: tuple[LayerReport, ...]


def costs(subject: Subject, options: ReportOptions) -> Costs | Missing:
    """Count the complexity of the network."""
    channels, height, width = subject.input_size(options.input_size)
    try:
        with quietly():
            counted = complexity(subject.model, (channels, height, width))
            is_sparse = counted.nonzero.params < (1 - FEWEST) * counted.training.params
            layers = compact_report(subject.model, input_size=(1, channels, height, width)).layers if is_sparse else ()
    except WidekernelError as error:
        return Missing(f"It cannot be counted: {error}", "Try another input size: `--input_size PIXELS`.")
    return Costs(counted, layers)
