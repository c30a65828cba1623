"""The published figures of SLaK-T."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from widekernel.analysis.complexity import complexity
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig, compact

pytestmark = pytest.mark.full


@pytest.mark.parametrize("rule", ["exact", "published"])
def test_slak_tiny_at_forty_percent(rule: str) -> None:
    """Published after SNIP at 40 %: 30 M nonzero parameters and 5.0 G nonzero multiply-accumulates."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("slak_tiny").train()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 3, 224, 224, generator=generator), torch.randint(0, 1000, (4,), generator=generator)
    config = DynamicSparsityConfig(sparsity=0.4, init="snip", rule=rule)
    controller = DynamicSparsity(model, optimizer, config, batch=batch)
    counted = complexity(model, (3, 224, 224))
    assert counted.dense.params == pytest.approx(50.7e6, rel=1e-3)
    assert counted.dense.macs == pytest.approx(8.70e9, rel=1e-3)
    assert 30.4e6 <= counted.nonzero.params <= 30.6e6
    assert 4.9e9 <= counted.nonzero.macs <= 5.0e9
    # Single zeros save no computation.
    assert counted.realized.macs == counted.folded.macs > 8.6e9
    assert json.loads(json.dumps(counted.to_dict()))["nonzero"]["macs"] == counted.nonzero.macs
    if rule == "exact":
        assert controller.active() == round(0.6 * sum(mask.numel() for mask in controller.masks.values()))


def test_slak_tiny_with_pruned_channels() -> None:
    """Channels that are pruned as a whole are not computed."""
    model = timm.create_model("slak_tiny").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = DynamicSparsityConfig(sparsity=0.5, init="magnitude", block="channel", layers="large_kernel_only")
    DynamicSparsity(model, optimizer, config)
    counted = complexity(model, (3, 224, 224))
    assert counted.realized.macs < counted.folded.macs
    smaller, x = compact(model), torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = model.eval()(x)
        error = (smaller(x) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5
