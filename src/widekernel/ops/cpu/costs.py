"""Constants of the cost model in plan.py by instruction set and processor; `benchmarks/cpu_costs.py` measures them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What the parts of an algorithm take, in processor cycles.

    Attributes:
        measured_with: the instruction set that the constants were measured with, and the processor if it matters.
        direct_rate: vector multiply-adds in a cycle of the direct algorithm's micro-kernels.
        direct_tile: overhead of each call of a micro-kernel.
        dilated_rate, dilated_tile: the same for dilated kernels.
        complex_rate, complex_tile: the same for the products of spectra.
        transform_rate, transform_tile: the same for Fourier transforms.
        packing: packing or unpacking one vector.
        fetching: fetching one vector of a transformed kernel into the cache.
        in_place: the direct algorithm packs no channels_last image of float32 for a single kernel of up to so many taps.
        direct_width, complex_width, waves, lines: widths of the register tiles (native/src/simd.hpp).
    """

    measured_with: str
    direct_rate: float
    direct_tile: float
    dilated_rate: float
    dilated_tile: float
    complex_rate: float
    complex_tile: float
    transform_rate: float
    transform_tile: float
    packing: float
    fetching: float
    in_place: int
    direct_width: int
    complex_width: int
    waves: int
    lines: int


AVX512 = Costs("avx512", 1.8, 35, 1.8, 25, 1.75, 45, 1.8, 230, 12, 2.5, 91, 10, 5, 5, 4)
AVX2 = Costs("avx2", 1.66, 41, 1.82, 27, 2.0, 34, 2.0, 83, 4.6, 1.9, 64, 5, 4, 5, 2)
# One multiply-add of 512 bits in a cycle instead of two, while the rest takes hardly longer.
AVX512_ON_ZEN4 = Costs("avx512 on zen4", 0.96, 78, 0.97, 49, 1.0, 60, 0.98, 272, 13, 3.7, 91, 10, 5, 5, 4)
# Not measured with the last two, which have the register tiles of the others.
_OF = {"avx512": AVX512, "avx2": AVX2, "neon": AVX512, "portable": AVX2}


def costs_of(isa: str, processor: str = "other") -> Costs:
    """Return the constants for an instruction set on a processor, as the native library names it."""
    return AVX512_ON_ZEN4 if (isa, processor) == ("avx512", "zen4") else _OF[isa]
