"""Permutation of channels so that 2:4 masks lose less magnitude; the outputs of the network stay the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.sparsity.semi_structured.chains import Chain, find_chains
from widekernel.sparsity.semi_structured.config import SemiStructuredConfig
from widekernel.sparsity.semi_structured.permutation_search import kept_magnitude, search_permutation


@dataclass(frozen=True)
class Permuted:
    """The result of permuting the input channels of a layer.

    Attributes:
        reason: why the channels were not permuted; "" if they were.
        kept_before: share of the magnitude that 2:4 masks keep in the old order.
        kept_after: the same in the new order.
        producer: the layer that writes these channels.
    """

    reason: str
    kept_before: float = 0.0
    kept_after: float = 0.0
    producer: str = ""


def permute_channels(model: nn.Module, layers: list[str], config: SemiStructuredConfig) -> dict[str, Permuted]:
    """Permute the input channels of layers, in place, where this is known not to change the network's outputs.

    This holds where a single convolution or linear layer writes the channels, and only operations that treat all channels
    alike (activations, batch and layer norms, depthwise convolutions, pooling, response norms) lie between: for the two
    layers of an MLP, and for the convolutions within a residual branch. Channels of a residual stream are not permuted.

    Args:
        model: the network.
        layers: names of the layers.
        config: budget and seed of the search.

    Returns:
        the result for each layer, by name.
    """
    result = {}
    for name, chain in find_chains(model, layers).items():
        if isinstance(chain, str):
            result[name] = Permuted(chain)
            continue
        matrix = _matrix(model.get_submodule(name).weight)  # type: ignore[arg-type]
        if matrix.shape[1] % 4:
            result[name] = Permuted(f"{matrix.shape[1]} input channels are not a multiple of 4")
            continue
        order = search_permutation(matrix, config.permutation_rounds, config.permutation_escapes, config.seed)
        result[name] = Permuted("", kept_magnitude(matrix), kept_magnitude(matrix[:, order]), chain.producer)
        reorder(model, chain, order)
    return result


@torch.no_grad()
def reorder(model: nn.Module, chain: Chain, order: Tensor) -> None:
    """Reorder the channels between two layers, in place: the new channel i is the old channel `order[i]`."""
    consumer = model.get_submodule(chain.consumer)
    consumer.weight.copy_(consumer.weight[:, order])  # type: ignore[union-attr,operator,index]
    for name in (chain.producer, *chain.between):
        module = model.get_submodule(name)
        for value in (*module.parameters(), *module.buffers()):
            if value.dim():  # a scalar counts batches
                value.copy_(value[order])


def _matrix(weight: Tensor) -> Tensor:
    """Return a weight as a matrix (everything else, input channels)."""
    return weight.detach() if weight.dim() == 2 else weight.detach().permute(0, 2, 3, 1).reshape(-1, weight.shape[1])
