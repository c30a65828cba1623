"""Whatever happens to a fused block, it computes what its own code computes; and it says why it does not run fused."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tests.transforms.fusion import ByHand, Convolutional, calls_of, fused, fused_names, randomized
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.transforms import to_torch
from widekernel.transforms.acceleration.fusion import fused as module_of_fused

pytestmark = pytest.mark.usefixtures("always_faster", "packs")


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 12, 6, 5)


def fused_block(make: Callable[[], nn.Module] = ByHand) -> Any:
    block = randomized(make())
    fused(block, image())
    assert fused_names(block) == [""]
    return block


def own_result(block: nn.Module, x: Tensor) -> Tensor:
    """Run the code of the block's own class."""
    with torch.no_grad():
        torch.manual_seed(0)
        return nn.Module.__call__(block, x)  # type: ignore[no-any-return]


def assert_right(block: nn.Module, x: Tensor) -> int:
    """Compare with the block's own code, and return how many native calls ran."""
    torch.manual_seed(0)
    got, calls = calls_of(block, x)
    want = own_result(block, x)
    assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1.0, want.abs().max().item()))
    return calls


@torch.no_grad()
def scaled(tensor: Tensor) -> None:
    tensor.mul_(1.5)


def through_data(tensor: Tensor) -> None:
    tensor.data.mul_(1.5)


def through_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[...] *= 1.5


def with_other_data(tensor: Tensor) -> None:
    tensor.data = tensor.data * 1.5


@pytest.mark.parametrize("write", [scaled, through_data, through_numpy, with_other_data])
@pytest.mark.parametrize("make", [ByHand, Convolutional])
def test_writes_to_weights_are_noticed(make: Callable[[], nn.Module], write: Callable[[Tensor], None]) -> None:
    block, x = fused_block(make), image()
    last = own_result(block, x)
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        write(tensor)
        assert assert_right(block, x) == 1, name
        now = own_result(block, x)
        assert not torch.equal(now, last), name
        last = now


def replace_parameter(block: Any) -> None:
    block.scale = nn.Parameter(torch.randn(12))


def replace_layer(block: Any) -> None:
    block.mlp.fc1 = nn.Linear(12, 36)


def replace_activation(block: Any) -> None:
    block.mlp.act = nn.ReLU()


def load(block: Any) -> None:
    block.load_state_dict(randomized(ByHand()).state_dict())


def assign(block: Any) -> None:
    block.load_state_dict(randomized(ByHand()).state_dict(), assign=True)


def change_epsilon(block: Any) -> None:
    block.norm.eps = 0.5


def change_attribute(block: Any) -> None:
    block.shift_by = 2.0


def train_a_part(block: Any) -> None:
    block.mlp.drop1.train()


def prune_a_layer(block: Any) -> None:
    prune.random_unstructured(block.mlp.fc2, "weight", 0.5)


def parametrize_scale(block: Any) -> None:
    parametrize.register_parametrization(block, "scale", nn.Tanh())


def parametrize_layer(block: Any) -> None:
    parametrize.register_parametrization(block.mlp.fc1, "weight", nn.Tanh())


def remove_bias(block: Any) -> None:
    block.mlp.fc1.bias = None


def other_hidden_width(block: Any) -> None:
    block.mlp.fc1.weight, block.mlp.fc1.bias = nn.Parameter(torch.randn(9, 12)), nn.Parameter(torch.randn(9))
    block.mlp.fc2.weight = nn.Parameter(torch.randn(12, 9))
    block.mlp.fc1.out_features = block.mlp.fc2.in_features = 9


def change_layout(block: Any) -> None:
    block.to(memory_format=torch.channels_last)


def change_type(block: Any) -> None:
    block.mlp.double().float()


def replace_forward(block: Any) -> None:
    block.mlp.act.forward = torch.relu


# Each with the number of native calls afterwards; None for "either": the block may have been like that before.
CHANGES: dict[Callable[[Any], None], int] = {
    replace_parameter: 1,
    load: 1,
    assign: 1,
    change_layout: 1,
    other_hidden_width: 1,
    change_type: 1,
    replace_layer: 0,
    replace_activation: 0,
    change_epsilon: 0,
    change_attribute: 0,
    train_a_part: 0,
    prune_a_layer: 0,
    parametrize_scale: 0,
    parametrize_layer: 0,
    remove_bias: 0,
    replace_forward: 0,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes(change: Callable[[Any], None]) -> None:
    block, x = fused_block(), image()
    assert assert_right(block, x) == 1
    change(block)
    assert assert_right(block, x) == CHANGES[change]
    with torch.no_grad():
        assert bool(block.reasons_against(x)) == (CHANGES[change] == 0)


# Layers of different widths do not fit together.
COMPATIBLE = sorted(CHANGES.keys() - {other_hidden_width}, key=lambda change: change.__name__)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(COMPATIBLE), max_size=4, unique=True), st.randoms())
def test_sequences_of_changes(changes: list[Callable[[Any], None]], random: Any) -> None:
    block = randomized(ByHand())
    fused(block, image())
    for change in changes:
        try:
            change(block)
        except (RuntimeError, KeyError, AttributeError, ValueError, TypeError):
            return  # an earlier change rules it out
        assert_right(block, image(random.randint(1, 3)))


def test_parts_that_are_appended() -> None:
    block = nn.Sequential(nn.Conv2d(12, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 1)).eval()
    fused(block, image())
    assert fused_names(block) == [""]
    block.append(nn.Sigmoid())
    assert assert_right(block, image()) == 0
    with torch.no_grad():
        assert "other parts" in block.reasons_against(image())[0]  # type: ignore[operator]


@pytest.mark.parametrize("kind", [ByHand, Mlp, nn.GELU])
def test_classes_that_are_patched(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    block, own = fused_block(), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))
    assert assert_right(block, image()) == 0


def test_fused_classes_that_are_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    block = fused_block()
    monkeypatch.setattr(type(block), "forward", lambda _, x: 2 * x)
    assert assert_right(block, image()) == 0
    with torch.no_grad():
        assert "the block has another forward" in block.reasons_against(image())[0]


@pytest.mark.parametrize("name", ["", "mlp"])
@pytest.mark.parametrize("method", ["forward", "helper"])
def test_subclasses(name: str, method: str) -> None:
    block = fused_block()
    part: Any = block.get_submodule(name)
    kind: Any = type("Sub", (type(part),), {method: lambda self, x: 2 * super(kind, self).forward(x)})
    assert assert_right(block, image()) == 1
    part.__class__ = kind
    assert assert_right(block, image()) == 0
    with torch.no_grad():
        assert f"the class of {name or 'the block'} has changed" in block.reasons_against(image())[0]
    part.__class__ = kind.__base__
    assert assert_right(block, image()) == 1


def test_training_and_back() -> None:
    block, x = fused_block(), image()
    assert calls_of(block.train(), x)[1] == 0
    assert calls_of(block.eval(), x)[1] == 1
    y = block(x)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    optimizer.step()
    assert assert_right(block, x) == 1
    block.requires_grad_(False)
    assert torch.equal(block(x), calls_of(block, x)[0])


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("context", "x", "reason"),
    [
        (torch.enable_grad, image, "gradients are wanted"),
        (autocast, image, "autocast is on"),
        (lambda: FlopCounterMode(display=False), image, "observes the operators"),
        (lambda: torch.device("cpu"), image, "observes the operators"),
        (forward_ad.dual_level, image, "observes the operators"),
        (nullcontext, lambda: image(0), "empty"),
        (nullcontext, image, ""),
    ],
)
def test_calls_that_run_the_code_of_the_block(context: Any, x: Callable[[], Tensor], reason: str) -> None:
    block, value = fused_block(), x()
    with torch.no_grad(), context(), ops.trace() as traced:
        reasons = block.reasons_against(value)
        got, want = block(value), nn.Module.__call__(block, value)
    assert torch.equal(got, want) == bool(reason)
    assert reason in "; ".join(reasons)
    assert len(traced.fused) == (0 if reason else 2)  # one of them is that of `reasons_against`


def test_other_arguments_and_types() -> None:
    block, x = fused_block(), image()
    with torch.no_grad():
        assert torch.equal(block(x=x), nn.Module.__call__(block, x))
        with pytest.raises(ValueError, match="11 channels"):
            block(torch.randn(2, 11, 6, 5))
        assert "float64" in block.reasons_against(x.double())[0]
        assert "meta" in block.reasons_against(x.to("meta"))[0]
        with pytest.raises(RuntimeError, match="permute"):
            block(x[0])
        want = torch.func.vmap(lambda image: nn.Module.__call__(block, image))(x[:, None])
        assert_close(torch.func.vmap(block)(x[:, None]), want)


def test_inputs_with_other_channels() -> None:
    images, rows = fused_block(Convolutional), nn.Sequential(nn.Linear(12, 8), nn.ReLU()).eval()
    fused(rows, torch.randn(3, 12))
    with torch.no_grad():
        assert images.reasons_against(torch.randn(2, 11, 6, 5)) == ["a value has 11 channels where 12 are needed"]
        assert rows.reasons_against(torch.randn(3, 11)) == ["a value has 11 channels where 12 are needed"]  # type: ignore[operator]
        assert rows.reasons_against(torch.tensor(1.0)) == ["a value has 0 channels where 12 are needed"]  # type: ignore[operator]


def test_inputs_in_any_layout() -> None:
    block = fused_block()
    for x in (
        image()[:, :, ::2],
        image().transpose(2, 3),
        image()[:1].expand(3, -1, -1, -1),
        torch.randn(2, 24, 6, 5)[:, ::2],
    ):
        assert assert_right(block, x) == 1
    with torch.inference_mode():
        assert_right(block, image())


@pytest.mark.parametrize("name", ["", "mixer", "norm", "mlp", "mlp.fc1", "mlp.act", "mlp.drop2", "drop_path"])
@pytest.mark.parametrize("replaced", [False, True])
def test_hooks_run(name: str, replaced: bool) -> None:
    block, x, seen = fused_block(), image(), []
    part = block.get_submodule(name)
    assert calls_of(block, x)[1] == 1
    if replaced:
        part._forward_hooks = OrderedDict()
    hook = part.register_forward_hook(lambda *_: seen.append(name))
    assert calls_of(block, x)[1] == 0
    assert seen == [name]
    hook.remove()
    assert calls_of(block, x)[1] == 1
    assert len(seen) == 1


def test_global_hooks_run() -> None:
    block, x, seen = fused_block(), image(), []
    hook = register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert calls_of(block, x)[1] == 0
    finally:
        hook.remove()
    assert nn.GELU in seen


def test_copies() -> None:
    block, x = fused_block(), image()
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(file, weights_only=False)):
        assert type(other) is type(block)
        assert vars(other).keys() == vars(ByHand()).keys()
        scaled(other.scale)
        calls_of(other, x)  # the first call compares the native calls with the code of the block
        assert assert_right(other, x) == 1
    shallow = copy.copy(block)
    shallow._modules = {**block._modules, "norm": nn.LayerNorm(12, eps=0.5)}
    calls_of(shallow, x)
    assert assert_right(shallow, x) == 1
    assert assert_right(block, x) == 1


def test_first_calls_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = fused_block(), image()
    hooked, given, alone = (copy.deepcopy(block) for _ in range(3))
    hook = hooked.mlp.fc2.register_forward_hook(lambda *_: None)
    for _ in range(5):
        assert calls_of(hooked, x)[1] == 0
    hook.remove()
    assert calls_of(hooked, x)[1] > 0
    with torch.no_grad():
        assert "float64" in given.double().reasons_against(x.double())[0]
        given.float()
        assert given.reasons_against(x) == []
    monkeypatch.setattr(module_of_fused, "missing", lambda _: "there is no native library")
    assert calls_of(alone, x)[1] == 0
    with torch.no_grad():
        assert alone.reasons_against(x) == ["there is no native library"]
    assert assert_right(alone, x) == 0


def test_copies_of_parametrized_blocks() -> None:
    block, x = fused_block(), image()
    parametrize_scale(block)
    assert_right(copy.deepcopy(block), x)  # other parts may be fused, but not the scale
    other = copy.deepcopy(block)
    parametrize.remove_parametrizations(other, "scale")
    calls_of(other, x)
    assert type(other) is type(fused_block())
    assert assert_right(other, x) == 1
    with pytest.raises(ArgumentError, match="remove its parametrizations"):
        to_torch(block)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        block = randomized(ByHand())
        _, report = fused(block, image())
    assert "inference tensor" in report[""].reason
    assert fused_names(block) == []


@pytest.mark.slow
def test_scripting_and_tracing() -> None:
    block, x = fused_block(), image()
    want = own_result(block, x)
    with torch.no_grad():
        for program in (torch.jit.script(block), torch.jit.trace(block, x)):
            assert_close(program(x), want)
            assert "native" not in str(program.graph)
        exported = torch.export.export(block, (x,)).module()
        assert_close(exported(x), want)
    assert calls_of(block, x)[1] == 1


@pytest.mark.slow
def test_compiled_whole() -> None:
    torch._dynamo.reset()
    block, x = fused_block(), image()
    got, calls = calls_of(torch.compile(block, fullgraph=True, backend="eager"), x)
    assert calls == 0
    assert_close(got, own_result(block, x))
