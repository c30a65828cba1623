"""timm's contract for models, for every family and every step of the roadmap."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.models import group_parameters
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2
from torch import nn

from tests.models.zoo import NANO, SMALL, alive, assert_near, assert_same_state, create, images, snapshot

# The steps of the roadmap have the same parts in other combinations: every fourth is short.
_ROADMAP = [name for name in SMALL if name.startswith("roadmap_") and name.endswith("_small")]
every_small_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in _ROADMAP and _ROADMAP.index(name) % 4 else [])
        for name in SMALL
    ],
)
every_family = pytest.mark.parametrize("name", NANO)


def _logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@every_small_model
def test_forward(name: str) -> None:
    logits = _logits(create(name, num_classes=7).eval(), images())
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@every_small_model
def test_backward_reaches_every_parameter(name: str) -> None:
    model = create(name, num_classes=7).train()
    model(images()).square().mean().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    # A norm of returned feature maps has no influence on the logits.
    assert [key for key in without if not key.startswith("feature_norms.")] == []
    broken = [key for key, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert broken == []


@every_family
def test_every_parameter_changes_the_logits(name: str) -> None:
    model = alive(name)
    model(images()).square().mean().backward()
    dead = [key for key, parameter in model.named_parameters() if not parameter.grad.any()]
    assert dead == []


@every_family
def test_the_images_of_a_batch_do_not_mix_in_evaluation(name: str) -> None:
    model, x = alive(name), images()
    assert_near(_logits(model, x)[:1], _logits(model, x[:1]))


@every_small_model
def test_default_cfg_matches_the_network(name: str) -> None:
    model = create(name).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert f"{cfg['classifier']}.weight" in state
    assert state[f"{cfg['classifier']}.weight"].shape[0] == cfg["num_classes"] == 1000
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0] == 3
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    size = cfg["input_size"][-1]
    with torch.no_grad():
        assert model.forward_features(images(size, 1)).shape[-2:] == cfg["pool_size"]


@every_small_model
def test_reset_classifier(name: str) -> None:
    model, x = create(name).eval(), images()
    width = model.num_features
    model.reset_classifier(0)
    assert model.num_classes == 0
    pooled = _logits(model, x)
    assert pooled.shape == (2, width)
    assert not any(key.startswith("head.fc.") for key in model.state_dict())
    model.reset_classifier(0, "")
    unpooled = _logits(model, x)
    assert unpooled.dim() == 4
    assert unpooled.shape[:2] == (2, width)
    model.reset_classifier(5, "avg")
    assert model.num_classes == 5
    assert _logits(model, x).shape == (2, 5)


@every_small_model
def test_without_classifier(name: str) -> None:
    model, x = create(name, num_classes=0).eval(), images()
    assert isinstance(model.get_classifier(), nn.Identity)
    pooled = _logits(model, x)
    assert pooled.shape == (2, model.num_features)
    with torch.no_grad():
        torch.testing.assert_close(pooled, model.forward_head(model.forward_features(x), pre_logits=True))


@every_family
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", ""])
def test_pooling(name: str, pool: str) -> None:
    model = create(name, global_pool=pool, num_classes=0).eval()
    out = _logits(model, images())
    assert out.shape[:2] == (2, model.num_features)
    assert out.dim() == (2 if pool else 4)


@every_family
def test_other_pooling_gives_other_features(name: str) -> None:
    outputs = []
    for pool in ("avg", "max"):
        torch.manual_seed(3)
        outputs.append(_logits(alive(name, global_pool=pool, num_classes=0), images()))
    assert not torch.allclose(*outputs)


@every_small_model
def test_features_only(name: str) -> None:
    model = create(name, features_only=True).eval()
    maps = _logits(model, images(96))
    assert len(maps) == len(model.feature_info) >= 4
    for feature, width, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction()):
        assert feature.shape == (2, width, 96 // reduction, 96 // reduction)
    assert not any(key.startswith("model.head.") for key in model.state_dict())


@every_family
def test_features_only_of_some_stages(name: str) -> None:
    torch.manual_seed(5)
    every = create(name, features_only=True, out_indices=(0, 1, 2, 3)).eval()
    torch.manual_seed(5)
    some = create(name, features_only=True, out_indices=(0, 2)).eval()
    assert some.feature_info.channels() == [every.feature_info.channels()[i] for i in (0, 2)]
    assert "model.stages.3.blocks.0.norm.weight" not in some.state_dict()
    torch.testing.assert_close(_logits(some, images()), _logits(every, images())[::2], rtol=0, atol=0)


@every_family
@pytest.mark.parametrize("kind", ["fx", "hook", "getter", "list"])
def test_every_kind_of_feature_extractor(name: str, kind: str) -> None:
    outputs = []
    for chosen in ("getter", kind):
        torch.manual_seed(5)
        outputs.append(_logits(create(name, features_only=True, feature_cls=chosen, out_indices=(1, 3)).eval(), images()))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@every_small_model
def test_forward_intermediates(name: str) -> None:
    model, x = alive(name), images()
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert len(maps) == len(model.feature_info)
        torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
        some = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        torch.testing.assert_close(some, [maps[0], maps[2]], rtol=0, atol=0)
        last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        torch.testing.assert_close(last_two, maps[-2:], rtol=0, atol=0)
        normed = model.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)
        torch.testing.assert_close(normed[0], final, rtol=0, atol=0)
    for feature, info in zip(maps, model.feature_info):
        assert feature.shape == (2, info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])


@every_family
def test_stop_early(name: str) -> None:
    model, x = alive(name), images()
    computed = []
    model.stages[2].register_forward_hook(lambda *_: computed.append(2))
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
        assert computed == []
        _, all_maps = model.forward_intermediates(x, indices=[0, 1])
    assert computed == [2]
    torch.testing.assert_close(maps, all_maps, rtol=0, atol=0)
    torch.testing.assert_close(final, maps[1], rtol=0, atol=0)


@every_family
def test_intermediates_must_be_nchw(name: str) -> None:
    with pytest.raises(ValueError, match=r"'NHWC' is not supported.*'NCHW'"):
        create(name).forward_intermediates(images(), output_fmt="NHWC")


@every_family
def test_prune_intermediate_layers(name: str) -> None:
    model, x = alive(name), images()
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        before = sum(parameter.numel() for parameter in model.parameters())
        assert model.prune_intermediate_layers([0, 1]) == [0, 1]
        assert sum(parameter.numel() for parameter in model.parameters()) < before
        assert len(model.stages) == 2
        torch.testing.assert_close(model.forward_intermediates(x, [0, 1], intermediates_only=True), expected, rtol=0, atol=0)
        assert model(x).shape[:2] == (2, model.num_features) == (2, expected[1].shape[1])


@every_family
def test_pruning_can_keep_the_head(name: str) -> None:
    model, x = alive(name), images()
    expected = _logits(model, x)
    model.prune_intermediate_layers([3], prune_head=False)
    torch.testing.assert_close(_logits(model, x), expected, rtol=0, atol=0)


@every_small_model
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, x = alive(name).train(), images()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # recomputing would update the running statistics twice
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, reference in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], reference, msg=lambda text, key=key: f"{key}: {text}")


@every_small_model
@pytest.mark.parametrize("coarse", [False, True], ids=["fine", "coarse"])
def test_every_parameter_is_in_one_group(name: str, coarse: bool) -> None:
    model = create(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    grouped = [key for group in groups.values() for key in group]
    assert sorted(grouped) == sorted(key for key, _ in model.named_parameters())
    layer_of = {key: layer for layer, group in groups.items() for key in group}
    assert layer_of["head.fc.weight"] == max(groups)
    assert min(groups) == 0
    assert all(layer == 0 for key, layer in layer_of.items() if key.startswith("stem."))
    assert len(groups) >= (len(model.stages) + 1 if coarse else sum(len(stage.blocks) for stage in model.stages) + 1)


@every_family
def test_only_parameters_of_the_head_are_unmatched(name: str) -> None:
    model = create(name)
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    last = max(groups.values())
    assert all(key.startswith(("head.", "norm_pre.")) for key, layer in groups.items() if layer == last)


@every_small_model
def test_layer_decay(name: str) -> None:
    model = create(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert scale.keys() == set(names.values())
    assert scale["head.fc.weight"] == 1.0
    stem = next(key for key in scale if key.startswith("stem."))
    depth = [scale[stem], *(scale[_first(scale, f"stages.{i}.blocks.0.")] for i in range(4)), 1.0]
    assert depth == sorted(set(depth))
    assert all(decay[key] == 0 for key, parameter in model.named_parameters() if parameter.dim() == 1)
    assert decay["head.fc.weight"] == 0.05


def _first(keys: dict[str, float], prefix: str) -> str:
    return next(key for key in keys if key.startswith(prefix))


@every_small_model
def test_no_weight_decay_names_parameters(name: str) -> None:
    model = create(name)
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()}


@every_small_model
def test_drop_path_grows_from_block_to_block(name: str) -> None:
    model = create(name, drop_path_rate=0.3)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)
    assert all(rate > 0 for rate in rates)
    assert not any(type(module).__name__ == "DropPath" for module in create(name).modules())


@every_family
def test_dropout_comes_before_the_classifier(name: str) -> None:
    model, x = create(name, drop_rate=0.9, global_pool="avg"), images()
    model.eval()
    assert torch.equal(_logits(model, x), _logits(model, x))
    model.head.train()
    assert not torch.equal(_logits(model, x), _logits(model, x))


@every_small_model
def test_images_of_one_channel(name: str) -> None:
    model = create(name, in_chans=1, num_classes=3).eval()
    assert _logits(model, images(channels=1)).shape == (2, 3)


@every_small_model
def test_images_of_odd_sizes(name: str) -> None:
    assert _logits(create(name, num_classes=3).eval(), torch.randn(1, 3, 33, 47)).isfinite().all()


@every_small_model
def test_copies_and_pickles(name: str) -> None:
    model, x = alive(name), images()
    expected = _logits(model, x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_state(clone.state_dict(), model.state_dict())
        assert torch.equal(_logits(clone, x), expected)


@every_small_model
def test_state_dict_round_trip(name: str) -> None:
    model, x = alive(name), images()
    other = create(name)
    other.load_state_dict(snapshot(model))
    assert_same_state(other.state_dict(), model.state_dict())
    assert torch.equal(_logits(other.eval(), x), _logits(model, x))


@every_small_model
def test_channels_last(name: str) -> None:
    model, x = alive(name), images()
    expected = _logits(model, x)
    out = _logits(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert_near(out, expected)


@every_family
def test_training_step_in_bfloat16(name: str) -> None:
    model, x = create(name, num_classes=5, drop_path_rate=0.1).train(), images()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    before = snapshot(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 3]))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.dtype is torch.float32
        assert parameter.isfinite().all(), key
    assert not torch.equal(model.state_dict()["head.fc.weight"], before["head.fc.weight"])
