"""Networks as TorchScript, scripted and traced, for programs in which widekernel is not installed."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models._features_fx import create_feature_extractor
from torch import nn

from tests.models.zoo import ALIKE, NANO, alive, assert_near, create, images
from tests.transforms.compaction import FREE, mask
from widekernel import fold, ops, to_torch
from widekernel.transforms.compaction import compact

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning")


def recorded(model: nn.Module, x: torch.Tensor) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        # Warnings of the tracer mean that the graph is wrong for other images, except those about PyTorch's own batch norm
        # in training and about lists as outputs.
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"torch\.nn\.functional")
        warnings.filterwarnings("ignore", "Encountering a list", torch.jit.TracerWarning)
        return torch.jit.trace(model, x, check_trace=False)


def operators(module: torch.jit.ScriptModule) -> set[str]:
    return {name.partition("::")[0] for name in torch.jit.export_opnames(module)} - {"prim"}


def kinds(block: Any) -> set[str]:
    """Return the kinds of the nodes of a graph, at any depth."""
    return {node.kind() for node in block.nodes()}.union(*(kinds(part) for node in block.nodes() for part in node.blocks()))


# A folded network differs in its spatial layers alone: one family for each kind of kernel is short.
FOLDED = ("slak_nano", "shiftwise_nano", "unireplknet_nano")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            name, form, marks=[pytest.mark.slow] if name in ALIKE or (form == "folded" and name not in FOLDED) else []
        )
        for name in NANO
        for form in ("training", "folded")
    ],
)
def test_scripted_and_traced_networks_compute_the_same(name: str, form: str) -> None:
    model = alive(name) if form == "training" else fold(alive(name))
    before = list(model.modules())
    x, other = images(), images(96, 3)
    both = [torch.jit.script(model), recorded(model, x)]
    with torch.no_grad():
        for y in (x, other, x.contiguous(memory_format=torch.channels_last)):
            wanted = model(y)
            for module in both:
                with ops.trace() as trace:
                    assert_near(module(y), wanted)
                assert trace.calls == []
    for module in both:
        assert operators(module) == {"aten"}
    # Converters read the frozen graph of a scripted network, and know neither loops over lists nor queries for layouts.
    frozen = torch.jit.freeze(both[0])
    assert not kinds(frozen.inlined_graph) & {"prim::Loop", "aten::append", "aten::is_contiguous"}
    # The network itself is unchanged and still uses our kernels.
    assert list(model.modules()) == before
    with ops.trace() as trace, torch.no_grad():
        model(x)
    assert len(trace.calls) > 0
    assert "plain" not in trace.backends()


def test_compacted_networks() -> None:
    """timm's record of a network's arguments, which TorchScript must not read, does not exist for them."""
    with torch.no_grad():
        small = compact(mask(alive("slak_nano"), "channel", 0.5), FREE)
        scripted = torch.jit.script(small)
        for x in (images(), images(96, 3)):
            assert_near(scripted(x), small(x))
    assert operators(scripted) == {"aten"}
    assert not kinds(torch.jit.freeze(scripted).inlined_graph) & {"prim::Loop", "aten::append", "aten::is_contiguous"}


@pytest.mark.parametrize("name", ["replknet_nano", "slak_nano"])
def test_dilated_kernels(name: str) -> None:
    """The last stages of the network keep their resolution."""
    model, x = alive(name, output_stride=8), images()
    modules = [torch.jit.script(model), recorded(model, x), torch.jit.script(fold(model))]
    with torch.no_grad():
        for y in (x, images(96, 3)):
            for module in modules:
                assert_near(module(y), model(y))


@pytest.mark.parametrize("name", ["slak_nano", "shiftwise_nano"])
@pytest.mark.parametrize("how", ["scripted", "recorded"])
def test_training_a_scripted_or_traced_network(name: str, how: str) -> None:
    model, x = alive(name).train(), images()
    module = torch.jit.script(model) if how == "scripted" else recorded(model, x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients, statistics = [], []
    for run in (model, module):
        model.load_state_dict(state)
        model.zero_grad()
        run(x).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        statistics.append({key: buffer.clone() for key, buffer in model.named_buffers()})
    assert_near(gradients[1], gradients[0], 1e-4)
    for key, wanted in statistics[0].items():
        torch.testing.assert_close(statistics[1][key], wanted)


@pytest.mark.parametrize("kind", ["getter", "list"])
def test_feature_maps(kind: str) -> None:
    name = "replknet_nano_feature_norms"
    model, x = create(name, features_only=True, feature_cls=kind, out_indices=(0, 2)).eval(), images()
    with torch.no_grad():
        wanted = model(x)
        for module in (torch.jit.script(model), recorded(model, x)):
            for got, want in zip(module(x), wanted, strict=True):
                assert_near(got, want)


def test_scripting_a_symbolically_traced_network() -> None:
    model, x = alive("replknet_nano"), images()
    module = torch.jit.script(create_feature_extractor(model, {"head": "logits"}).eval())
    with torch.no_grad():
        assert_near(module(x)["logits"], model(x))


def test_tiles_beyond_the_border_at_any_size() -> None:
    """Which tiles are dropped depends on the size of the image, which a traced graph must not fix."""
    model, x = alive("slak_pw_nano_truncated"), images()
    both = [torch.jit.script(model), recorded(model, x)]
    with torch.no_grad():
        for size in (32, 64, 160):
            for module in both:
                assert_near(module(images(size)), model(images(size)))


def test_scripted_networks_refuse_wrong_images() -> None:
    module = torch.jit.script(create("slak_nano").eval())
    for shape in [(1, 3, 64), (1, 1, 64, 64), (1, 3, 16, 64)]:
        with pytest.raises(torch.jit.Error, match=r"the input has shape .*takes \(N, 3, H, W\), H and W at least 32"):
            module(torch.zeros(shape))


LOADED = """
import sys, torch
x = torch.load(sys.argv[1])
for file in sys.argv[2:]:
    module = torch.export.load(file).module() if file.endswith(".pt2") else torch.jit.load(file)
    with torch.no_grad():
        torch.save(module(x), file + ".out")
assert "widekernel" not in sys.modules
"""


@pytest.mark.slow
def test_files_need_no_widekernel(tmp_path: Path) -> None:
    model, x = fold(alive("slak_nano")), images()
    torch.save(x, tmp_path / "x.pt")
    torch.jit.save(torch.jit.script(model), tmp_path / "scripted.pt")
    torch.jit.save(recorded(model, x), tmp_path / "recorded.pt")
    program = torch.export.export(model, (x,)).run_decompositions(ops.decompositions())
    torch.export.save(program, tmp_path / "exported.pt2")
    files = [str(tmp_path / name) for name in ("scripted.pt", "recorded.pt", "exported.pt2")]
    arguments = [sys.executable, "-c", LOADED, str(tmp_path / "x.pt"), *files]
    subprocess.run(arguments, check=True, cwd=tmp_path)
    with torch.no_grad():
        wanted = model(x)
    for file in files:
        assert_near(torch.load(f"{file}.out"), wanted)


def test_an_exported_program_holds_our_operators_until_it_is_decomposed() -> None:
    model, x = fold(alive("slak_nano")), images()
    program, file = torch.export.export(model, (x,)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with ops.trace() as trace, torch.no_grad():
        assert_near(torch.export.load(file).module()(x), model(x))
    assert len(trace.calls) > 0
    assert "plain" not in trace.backends()


@pytest.mark.slow
def test_a_program_that_is_not_decomposed_names_the_operator_that_is_missing(tmp_path: Path) -> None:
    """The messages are those of docs/pytorch-tools.md."""
    x = images()
    torch.save(x, tmp_path / "x.pt")
    torch.export.save(torch.export.export(fold(alive("slak_nano")), (x,)), tmp_path / "ours.pt2")
    arguments = [sys.executable, "-c", LOADED, str(tmp_path / "x.pt"), str(tmp_path / "ours.pt2")]
    said = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode != 0
    assert "torch.ops.widekernel.depthwise_sum.default" in said.stderr
    assert "RuntimeError: We ran into an error when deserializing" in said.stderr
    torch.export.save(torch.export.export(to_torch(fold(alive("slak_nano"))), (x,)), tmp_path / "plain.pt2")
    subprocess.run([*arguments[:-1], str(tmp_path / "plain.pt2")], check=True, cwd=tmp_path)
