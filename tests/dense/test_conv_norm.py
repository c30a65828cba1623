"""Convolution, norm and activation of the heads."""

from __future__ import annotations

import pytest
import torch

from widekernel import fold
from widekernel.dense.conv_norm import conv_norm
from widekernel.errors import ArgumentError

BATCH = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]


@pytest.mark.parametrize(
    ("norm", "keys"),
    [("batch", BATCH), ("group", ["gn.weight", "gn.bias"]), ("none", ["conv.bias"])],
)
def test_names(norm, keys: list[str]) -> None:
    assert list(conv_norm(32, 64, 3, norm=norm).state_dict()) == ["conv.weight", *keys]


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_values(norm) -> None:
    layer, x = conv_norm(32, 64, 3, stride=2, norm=norm), torch.randn(2, 32, 9, 9)
    plain = conv_norm(32, 64, 3, stride=2, norm=norm, relu=False)
    plain.load_state_dict(layer.state_dict())
    assert layer(x).shape == (2, 64, 5, 5)
    assert (plain(x) < 0).any()
    assert torch.equal(layer(x), plain(x).relu())


def test_initial_weights() -> None:
    """The deviation is sqrt(2 / (number of outputs of a weight))."""
    layer = conv_norm(64, 256, 3, norm="none")
    assert abs(layer.conv.weight.std().item() / (2 / (256 * 9)) ** 0.5 - 1) < 0.02
    assert not layer.conv.bias.any()


def test_batch_norm_folds() -> None:
    layer, x = conv_norm(8, 16, 3), torch.randn(2, 8, 9, 9)
    layer(x)
    layer.eval()
    folded = fold(layer)
    assert list(folded.state_dict()) == ["conv.weight", "conv.bias"]
    torch.testing.assert_close(folded(x), layer(x), rtol=1e-4, atol=1e-5)


def test_unknown_norm() -> None:
    with pytest.raises(ArgumentError, match="norm"):
        conv_norm(8, 8, 3, norm="layer")  # type: ignore[arg-type]
