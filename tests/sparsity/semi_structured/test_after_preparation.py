"""2:4 networks after preparation: other weights, wrappers, compaction, features."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.models.zoo import alive
from widekernel.analysis.complexity import complexity
from widekernel.errors import ArgumentError, CheckpointError
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig, compact, compact_report
from widekernel.sparsity.semi_structured import (
    SemiStructuredConfig,
    convert,
    load_sparse,
    magnitude_mask,
    manifest_of,
    prepare,
    save_sparse,
    validate,
)
from widekernel.sparsity.semi_structured.chains import find_chains


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def test_choices_follow_other_semi_structured_weights(tmp_path: Path) -> None:
    """Weights that were loaded or trained since then may be 2:4 in other positions; none of them is lost."""
    model = mlp()
    prepare(model)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(9)))
            layer.weight.mul_(magnitude_mask(layer.weight))
    plain = convert(model)
    loaded = mlp()
    load_sparse(loaded, save_sparse(plain, tmp_path / "a.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    config = DynamicSparsityConfig(
        sparsity=0.5, block="semi_structured", init="from_weights", growth="random", update_interval=1
    )
    controller = DynamicSparsity(plain, optimizer, config)
    for _ in range(3):
        plain(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    assert sum(controller.grown.values())
    load_sparse(loaded, save_sparse(plain, tmp_path / "b.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters()))


def test_layers_that_are_not_semi_structured_stay_dense_if_masks_come_from_weights() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    prepare(model)  # eight input channels are too few for hardware, so the first layer stays dense
    config = DynamicSparsityConfig(sparsity=0.5, block="semi_structured", init="from_weights", growth="none")
    controller = DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.1), config)
    reasons = {choice.name: choice.reason for choice in controller.choices}
    assert set(controller.masks) == {"2.weight"} and reasons["0.weight"] == "is not 2:4 now"
    assert torch.equal(controller.masks["2.weight"], model[2].weight != 0)


def test_wrapped_networks_are_unwrapped(tmp_path: Path) -> None:
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    controller = prepare(compiled)
    assert controller.model is model and validate(compiled) == validate(model)
    plain = convert(compiled)
    assert list(plain.state_dict()) == list(model.state_dict())
    save_sparse(compiled, tmp_path / "a.safetensors")


def test_a_compacted_network_is_no_longer_known_to_be_semi_structured() -> None:
    model = alive("slak_nano", num_classes=4)
    prepare(model, SemiStructuredConfig(axis="im2col"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("fc1.weight"):
                parameter[::2] = 0
    plain = convert(model)
    validate(plain)
    smaller = compact(plain)
    with pytest.raises(ArgumentError, match="has no 2:4 masks"):
        manifest_of(smaller)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(smaller(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_compacting_twice_reports_both_times() -> None:
    model = alive("slak_nano", num_classes=4)
    once = compact(model)
    with torch.no_grad():
        for name, parameter in once.named_parameters():
            if ".kernels." in name:
                parameter.zero_()
    twice = compact(once)
    before, after = (sum(layer.realized for layer in compact_report(network)) for network in (once, twice))
    assert after < before
    once.compaction = "something else"
    assert sum(layer.realized for layer in compact_report(compact(once))) == after


def test_complexity_counts_no_logits() -> None:
    model = alive("slak_nano", num_classes=4)
    dense = complexity(model, (3, 64, 64))
    controller = prepare(model, SemiStructuredConfig(method="learned"))
    counted = complexity(model, (3, 64, 64))
    assert counted.dense == dense.dense
    masked = sum(int((~mask).sum()) for mask in controller.masks.values())
    assert dense.nonzero.params - counted.nonzero.params == masked


def test_features_keep_the_order_of_their_channels() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=4).eval().double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    outputs, features = model(x), model.forward_features(x)
    consumers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    found = find_chains(model, consumers)
    assert found["conv_head"] == "it reads the outputs of forward_features"
    controller = prepare(model, SemiStructuredConfig(method="permuted", permutation_rounds=3))
    assert any(row.masked and not row.reason for row in controller.report)
    permuted = convert(model)
    assert outputs.shape == permuted(x).shape and features.shape == permuted.forward_features(x).shape


def test_learned_masks_are_compiled_once() -> None:
    model = mlp()
    controller = prepare(model, SemiStructuredConfig(method="learned"))
    optimizer = torch.optim.Adam(controller.parameters(), 0.1)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 16)
    compiled(x).square().mean().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(12):
            optimizer.step()
            controller.step()
            compiled(x).square().mean().backward()
    torch._dynamo.reset()


def test_damaged_headers_are_errors(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    for header in ([], {"version": 1}, {"version": 1, "shapes": {}, "weights": []}):
        save_file({"x": torch.zeros(1)}, path, metadata={"widekernel.two_four": json.dumps(header)})
        with pytest.raises(CheckpointError, match="damaged"):
            load_sparse(mlp(), path)
