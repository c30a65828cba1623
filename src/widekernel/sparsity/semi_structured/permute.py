"""Reordering channels within a network so that 2:4 masks lose less; its outputs stay the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.sparsity.semi_structured.chains import Chain, find_chains
from widekernel.sparsity.semi_structured.permutation import kept_magnitude, search_permutation
from widekernel.sparsity.two_four_config import SemiStructuredConfig


@dataclass(frozen=True)
class Permuted:
    """What became of the channels that a layer reads.

    Attributes:
        reason: why they were not reordered; "" if they were.
        kept_before: share of the magnitude that two of four kept in the old order.
        kept_after: the same in the new order.
        producer: the layer that writes them.
    """

    reason: str
    kept_before: float = 0.0
    kept_after: float = 0.0
    producer: str = ""


def permute_channels(model: nn.Module, layers: list[str], config: SemiStructuredConfig) -> dict[str, Permuted]:
    """Reorder the input channels of layers, in place, wherever that is known not to change the network.

    That is where one convolution or linear layer alone writes them, and only operations that treat all channels alike
    (activations, batch and layer norms, depthwise convolutions, pooling, response norms) lie between: the two layers of an
    MLP, and the convolutions within a residual branch. Channels of a residual stream stay.

    Args:
        model: the network.
        layers: names of the layers to do it for.
        config: budget and seed of the search.
    """
    result = {}
    for name, chain in find_chains(model, layers).items():
        if isinstance(chain, str):
            result[name] = Permuted(chain)
            continue
        matrix = _matrix(model.get_submodule(name).weight)  # type: ignore[arg-type]
        if matrix.shape[1] % 4:
            result[name] = Permuted(f"{matrix.shape[1]} input channels are no multiple of 4")
            continue
        order = search_permutation(matrix, config.permutation_rounds, config.permutation_escapes, config.seed)
        result[name] = Permuted("", kept_magnitude(matrix), kept_magnitude(matrix[:, order]), chain.producer)
        reorder(model, chain, order)
    return result


@torch.no_grad()
def reorder(model: nn.Module, chain: Chain, order: Tensor) -> None:
    """Reorder the channels between two layers, in place: channel i becomes what channel `order[i]` was."""
    consumer = model.get_submodule(chain.consumer)
    consumer.weight.copy_(consumer.weight[:, order])  # type: ignore[union-attr,operator,index]
    for name in (chain.producer, *chain.between):
        module = model.get_submodule(name)
        for value in (*module.parameters(), *module.buffers()):
            if value.dim():  # not the count of batches
                value.copy_(value[order])


def _matrix(weight: Tensor) -> Tensor:
    """Give a weight as (everything else, input channels)."""
    return weight.detach() if weight.dim() == 2 else weight.detach().permute(0, 2, 3, 1).reshape(-1, weight.shape[1])
