"""Chains notice whatever their recorded native calls depend on, say why they step aside, and keep no memory."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.transforms.chains import assert_right, by_blocks, chained, image
from tests.transforms.fusion import ByHand, Convolutional, Normalized, calls_of, fused, randomized
from widekernel.layers import DepthwiseConv2d
from widekernel.ops import recording
from widekernel.ops.cpu import library
from widekernel.transforms.acceleration.fusion import chains, packing, replay

needs_library = pytest.mark.skipif(packing.missing() is not None, reason="the native library cannot run")
pytestmark = pytest.mark.usefixtures("always_faster", "packs")


def _fewer_rows(model: Any) -> None:
    model[0].mixer.weight.data = model[0].mixer.weight.data[:, :, :1, :]


def _fewer_channels(model: Any) -> None:
    model[0].mixer.weight.data = model[0].mixer.weight.data[:6]


def _short_bias(model: Any) -> None:
    model[0].mixer.bias.data = model[0].mixer.bias.data[:5]


def _other_type(model: Any) -> None:
    model[0].mixer.bias.data = model[0].mixer.bias.data.view(torch.bfloat16)[:12]


@pytest.mark.parametrize("change", [_fewer_rows, _fewer_channels, _short_bias, _other_type])
def test_tensors_of_another_form_at_the_same_place_are_errors(change: Callable[[Any], None]) -> None:
    model, x = chained(), image()
    calls_of(model, x)
    change(model)
    with pytest.raises(Exception, match=r"shape|dtype|anchor") as theirs:
        by_blocks(model, x)
    with pytest.raises(type(theirs.value), match=r"shape|dtype|anchor"):
        calls_of(model, x)


def test_shallow_copies_of_members_have_plans_of_their_own() -> None:
    model, x = chained(), image()
    kind: Any = type(model[0])
    twin = kind.__new__(kind)
    vars(twin).update(vars(model[0]), _modules=dict(model[0]._modules))
    twin.mixer = nn.Conv2d(12, 12, 3, padding=1, groups=12)
    model[0] = twin
    for _ in range(3):
        assert_right(model, x)


@needs_library
@pytest.mark.parametrize(("module", "kind"), [(chains, "Replay"), (replay, "_Layers")])
def test_threads_that_run_while_members_change(monkeypatch: pytest.MonkeyPatch, module: Any, kind: str) -> None:
    model, x, results = chained(), image(), {}
    calls_of(model, x)
    entered, finished = threading.Event(), threading.Event()
    original = getattr(module, kind)

    def made(layers: Any) -> Any:
        if threading.current_thread().name == "slow":
            entered.set()
            finished.wait(10)
        return original(layers)

    def run() -> None:
        results[threading.current_thread().name] = calls_of(model, x)[0]

    monkeypatch.setattr(module, kind, made)
    del model[2]
    slow, fast = (threading.Thread(target=run, name=name) for name in ("slow", "fast"))
    slow.start()
    assert entered.wait(10)
    fast.start()
    fast.join()
    finished.set()
    slow.join()
    want = by_blocks(model, x)
    assert all(torch.allclose(results[name], want, rtol=1e-3, atol=1e-4) for name in ("slow", "fast"))


@needs_library
def test_former_weights_are_released() -> None:
    model, x = chained(), image()
    with torch.no_grad():
        for block in model:
            x = block(x)
    held = [weakref.ref(packed) for block in model for packed in chains.plan_of(block).current().values()]
    assert len(held) == 3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    calls_of(model, x)
    gc.collect()
    assert [packed() for packed in held] == [None] * 3


@needs_library
def test_recordings_keep_no_memory(replayed: list[int]) -> None:
    layer = DepthwiseConv2d(4, 4, 3, padding=1, groups=4)
    with torch.no_grad(), recording.recording() as made:
        y = layer(layer(torch.randn(1, 4, 5, 5)))
    first, second = made.calls
    assert (first.y, second.y) == (second.x, recording.Value.of(y))
    assert first.y.memory.expired()
    assert not second.y.memory.expired()
    # Values of the same size in turn get the memory of those before.
    model = chained(*[ByHand] * 5)
    for _ in range(2):
        assert_right(model, image(1, 20))
    assert replayed == [10]


def reasons(model: Any, x: Tensor) -> list[str]:
    with torch.no_grad():
        found: list[str] = model.reasons_against(x)
    return found


@contextmanager
def _replaced_class(kind: type[nn.Module]) -> Iterator[None]:
    original: Any = kind.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", lambda layer, x: original(layer, x).mul_(3))
        yield


@needs_library
@pytest.mark.parametrize("recorded", [True, False])
def test_replaced_forwards_of_layers_are_called(recorded: bool) -> None:
    model, x = chained(), image()
    if recorded:
        calls_of(model, x)
    with _replaced_class(DepthwiseConv2d):
        for _ in range(2):
            assert_right(model, x)
        assert reasons(model, x) == ["the forward of a class of layers has been replaced"]
    assert_right(model, x)


@needs_library
def test_replaced_forward_of_containers_is_called() -> None:
    model, x = chained(), image()
    want = 3 * by_blocks(model, x)
    with _replaced_class(nn.Sequential):
        assert torch.allclose(calls_of(model, x)[0], want, rtol=1e-3, atol=1e-4)
        assert reasons(model, x) == ["the forward of the class of the container has been replaced"]


def test_compiled_chains_are_compiled() -> None:
    model, x, graphs = chained(), image(), []
    calls_of(model, x)

    def compiler(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile(backend=compiler)
    assert_right(model, x)
    assert graphs


def _hooked(model: Any) -> None:
    model.register_forward_hook(lambda *_: None)


def _member_hooked(model: Any) -> None:
    model[1].register_forward_hook(lambda *_: None)


def _with_a_layer(model: Any) -> None:
    model.append(nn.ReLU())


def _with_other_code(model: Any) -> None:
    model[1] = fused(randomized(nn.ModuleList([Normalized()]))[0], image())[0]


def _forward_of_instance(model: Any) -> None:
    model.forward = lambda x: x + 1


def _copied_kernel(model: Any) -> None:
    model[0].mixer.weight.data = model[0].mixer.weight.data.transpose(2, 3)


REASONS: dict[str, tuple[Callable[[Any], None], Callable[[], Any]]] = {
    "gradients are enabled": (lambda _: None, torch.enable_grad),
    "autocast is on": (lambda _: None, lambda: torch.autocast("cpu", torch.bfloat16)),
    "a profiler is on": (lambda _: None, torch.profiler.profile),
    "there is a hook on the container": (_hooked, nullcontext),
    "1: the block has a hook": (_member_hooked, nullcontext),
    "3: it is not a fused block": (_with_a_layer, nullcontext),
    "1: it needs more than native calls": (_with_other_code, nullcontext),
    "the container has another forward than its class": (_forward_of_instance, nullcontext),
    "a native call reads a copy of a kernel or bias": (_copied_kernel, nullcontext),
}


@needs_library
@pytest.mark.parametrize("reason", REASONS)
def test_reasons_against_one_native_call(reason: str, replayed: list[int]) -> None:
    model, x = chained(ByHand, Convolutional, ByHand), image()
    assert reasons(model, x) == []
    replayed.clear()
    change, around = REASONS[reason]
    change(model)
    with torch.no_grad(), around():
        for _ in range(3):
            if reason != "1: it needs more than native calls":
                model(x)
        found = model.reasons_against(x)
    assert 5 not in replayed
    assert any(text.startswith(reason) for text in found), found


@needs_library
def test_inputs_that_no_native_call_covers() -> None:
    model = chained()
    assert reasons(model, torch.randn(12, 9, 12)) != []
    assert reasons(model, torch.randn(0, 12, 9, 12)) == ["the input is empty"]


@needs_library
def test_each_instruction_set_has_its_own_calls(replayed: list[int]) -> None:
    model, x, loaded = chained(), image(), library.load()
    first, used = loaded.isa, 0
    try:
        for isa in loaded.isas:
            loaded.use_isa(isa)
            for _ in range(2):
                assert_right(model, x)
            used += isa == first
    finally:
        loaded.use_isa(first)
    # `chained` has made one call with the first instruction set.
    assert replayed == [5] * (len(loaded.isas) + used)
