"""Files that hold what the network cannot take, more than it needs, or the same in another form."""

from __future__ import annotations

import argparse
import copy
import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import widekernel
from tests.models.zoo import NANO, alive, assert_near, assert_same_state, create, images, snapshot
from widekernel.errors import CheckpointError
from widekernel.models.checkpoint import loading
from widekernel.models.checkpoint import LoadReport

TABLES = ("tile_at", "centre", "selected", "ghosts")
WITH_TABLES = ["shiftwise_nano", "shiftwise_v1_nano", "slak_pw_nano", "slak_pw_nano_truncated"]
both_layouts = pytest.mark.parametrize("layout", ["native", "official"])


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(32))


def _state(model: nn.Module, folder: Path, layout: str) -> dict[str, Tensor]:
    if layout == "native":
        return dict(model.state_dict())
    path = widekernel.save_checkpoint(model, folder / "official.pth", layout="official")
    return torch.load(path, weights_only=True)["model"]


def _load(model: nn.Module, folder: Path, content: Any, **kwargs: Any) -> LoadReport:
    torch.save(content, folder / "file.pth")
    return widekernel.load_checkpoint(model, folder / "file.pth", **kwargs)


def _refused(model: nn.Module, folder: Path, content: Any, message: str) -> str:
    """Check that the file is refused with that message, and that nothing was loaded."""
    before, logits = snapshot(model), _logits(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        _load(model, folder, content)
    assert_same_state(model.state_dict(), before)
    assert torch.equal(_logits(model), logits)
    assert str(folder / "file.pth") in str(caught.value)
    return str(caught.value)


def _tables(state: dict[str, Tensor]) -> list[str]:
    return [key for key in state if key.endswith(TABLES)]


# ---- Tables


@pytest.mark.parametrize("name", WITH_TABLES)
def test_tables_that_a_file_lacks_are_drawn_anew(name: str, tmp_path: Path) -> None:
    model, other = alive(name), create(name)
    state = _state(model, tmp_path, "native")
    tables = _tables(state)
    for key in tables:
        other.state_dict()[key].zero_()
    report = _load(other, tmp_path, {key: value for key, value in state.items() if key not in tables})
    assert sorted(report.generated) == sorted(tables)
    assert not set(report.loaded) & set(tables)
    assert not report.missing
    assert all(key in str(report) for key in tables)
    assert_same_state(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["shiftwise_nano", "shiftwise_v1_nano"])
def test_official_files_bring_their_tables_back(name: str, tmp_path: Path) -> None:
    """The authors' code draws them when it makes the network, whatever this network has had before."""
    model, other = alive(name), create(name)
    for key in _tables(other.state_dict()):
        other.state_dict()[key].zero_()
    report = _load(other, tmp_path, {"model": _state(model, tmp_path, "official")})
    assert sorted(report.generated) == sorted(_tables(dict(model.state_dict())))
    assert_same_state(other.state_dict(), model.state_dict())
    assert torch.equal(_logits(other), _logits(model))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", ["shiftwise_nano", "shiftwise_v1_nano"])
def test_other_tables_have_no_place_in_an_official_file(name: str, table: str, tmp_path: Path) -> None:
    model = create(name)
    key = next(key for key in model.state_dict() if key.endswith(table))
    value = model.state_dict()[key]
    value.copy_(value.flip(-1).clone())
    with pytest.raises(CheckpointError, match=rf"{key} is not the table .*save with layout='native'"):
        widekernel.save_checkpoint(model, tmp_path / "a.pth", layout="official")
    assert not list(tmp_path.iterdir())


def _set_first(value: int) -> Any:
    def change(table: Tensor) -> Tensor:
        table.view(-1)[0] = value
        return table

    return change


NOT_TABLES = {
    "below": _set_first(-1),
    "far_above": _set_first(10_000),
    "float": lambda table: table.double(),
    "one_number": lambda table: table.view(-1)[0].clone(),
    "sparse": lambda table: table.to_sparse(),
}


@pytest.mark.parametrize("change", NOT_TABLES)
@pytest.mark.parametrize("table", ["source.tile_at", "source.centre", "selected", "ghosts"])
def test_what_is_no_table_is_refused(table: str, change: str, tmp_path: Path) -> None:
    model = alive("shiftwise_nano")
    state = _state(model, tmp_path, "native")
    key = [key for key in state if key.endswith(table)][-1]
    state[key] = NOT_TABLES[change](state[key].clone())
    message = _refused(model, tmp_path, state, "does not fit the ShiftWise; nothing was loaded")
    assert [line.split()[0] for line in message.splitlines()[1:]] == [key]


@pytest.mark.parametrize("name", WITH_TABLES)
def test_a_tile_in_two_slots_is_refused(name: str, tmp_path: Path) -> None:
    model = alive(name)
    state = _state(model, tmp_path, "native")
    key = [key for key in state if key.endswith("tile_at")][-1]
    state[key] = state[key].clone()
    state[key][..., 0, 0] = state[key][..., 0, 1]
    _refused(model, tmp_path, state, rf"nothing was loaded:\n  {key} is not made of permutations$")


@pytest.mark.parametrize("folded", [False, True], ids=["training", "folded"])
def test_channels_in_both_tables_are_refused(folded: bool, tmp_path: Path) -> None:
    model = alive("shiftwise_nano")
    model = widekernel.fold(model) if folded else model
    state = _state(model, tmp_path, "native")
    key = next(key for key in state if key.endswith("mixer.ghosts"))
    worked = state[key.replace("ghosts", "selected")]
    _refused(model, tmp_path, {**state, key: worked[: state[key].numel()].clone()}, f"{key} names channels of the other")
    outside = key.replace("ghosts", "selected")
    _refused(model, tmp_path, {**state, outside: worked + 16}, rf"{outside} must name different channels of 0\.\.15")


def test_folded_kernels_that_sit_elsewhere_are_refused(tmp_path: Path) -> None:
    model = widekernel.fold(alive("shiftwise_nano"))
    state = _state(widekernel.fold(alive("shiftwise_nano")), tmp_path, "native")
    key = next(key for key in state if key.endswith("anchor_table"))
    moved = state[key].clone()
    moved[0, 0] -= 1
    _refused(model, tmp_path, {**state, key: moved}, rf"{key} is \[\[0, 15\], .* but the anchors here are \[\(1, 15\)")
    assert _load(model, tmp_path, state).layout == "native"


# ---- Kinds of tensors


@both_layouts
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda t: t.to_sparse(), r"is stored as torch\.sparse_coo, the network's is dense"),
        (lambda t: t.to(torch.int64), r"has type torch\.int64 but the network's is torch\.float32"),
        (lambda t: t > 0, r"has type torch\.bool but the network's is torch\.float32"),
        (lambda t: t.to(torch.complex64), r"has type torch\.complex64 but the network's is torch\.float32"),
        (lambda t: t.to("meta"), "has a shape but no data in the file"),
    ],
    ids=["sparse", "integer", "bool", "complex", "meta"],
)
def test_weights_of_another_kind_are_refused(kind: Any, message: str, layout: str, tmp_path: Path) -> None:
    state = _state(alive("slak_nano"), tmp_path, layout)
    keys = [key for key in state if key.endswith(("gamma", "head.weight", "fc.weight"))]
    assert len(keys) == 6
    found = _refused(
        alive("slak_nano"),
        tmp_path,
        {**state, **{key: kind(state[key]) for key in keys}},
        f"nothing was loaded:\n.* {message}",
    )
    assert [line.split()[0] for line in found.splitlines()[1:]] == keys


def test_sparse_weights_of_a_form_that_is_converted(tmp_path: Path) -> None:
    state = _state(alive("slak_nano"), tmp_path, "official")
    key = "stages.0.0.large_kernel.LoRA1.conv.weight"
    _refused(
        alive("slak_reg_nano"), tmp_path, {**state, key: state[key].to_sparse()}, f"{key} is stored as torch.sparse_coo"
    )


@both_layouts
def test_a_network_without_memory_is_refused(layout: str, tmp_path: Path) -> None:
    state = _state(create("shiftwise_nano"), tmp_path, layout)
    with torch.device("meta"):
        model = create("shiftwise_nano")
    with pytest.raises(
        CheckpointError, match=r"head.*weight has nowhere to go.*call model\.to_empty\(device=\.\.\.\) first"
    ):
        _load(model, tmp_path, state)
    assert all(value.is_meta for value in model.state_dict().values())
    _load(model.to_empty(device="cpu"), tmp_path, state)
    assert_same_state(_state(model, tmp_path, layout), state)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_conversions_of_numbers_are_noted(dtype: torch.dtype, layout: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    state = _state(model, tmp_path, layout)
    report = _load(
        other, tmp_path, {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    )
    assert report.notes == (f"converted {str(dtype).removeprefix('torch.')} to float32",)
    assert other.head.fc.weight.dtype is torch.float32
    assert torch.equal(other.head.fc.weight, model.head.fc.weight.to(dtype).float())


def test_tables_of_another_width_are_read(tmp_path: Path) -> None:
    """They used to be kept as int16."""
    model, other = alive("shiftwise_nano"), create("shiftwise_nano")
    state = _state(model, tmp_path, "native")
    report = _load(other, tmp_path, {**state, **{key: state[key].to(torch.int16) for key in _tables(state)}})
    assert report.notes == ("converted int16 to int32",)
    assert_same_state(other.state_dict(), model.state_dict())


# ---- More than the weights


@both_layouts
def test_entries_that_are_no_weights_are_listed(layout: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    state = _state(model, tmp_path, layout)
    content = {
        "model": {**state, "version": 2, "_metadata": {"a": 1}},
        "epoch": 7,
        "optimizer": {"state": {}},
        "loss_weights": torch.ones(3),
    }
    report = _load(other, tmp_path, content)
    assert set(report.unused) == {"epoch", "optimizer", "loss_weights", "model.version", "model._metadata"}
    assert all(entry in str(report) for entry in report.unused)
    assert_same_state(other.state_dict(), model.state_dict())
    assert set(_load(other, tmp_path, {**state, "epoch": 7, "args": [1]}).unused) == {"epoch", "args"}
    nested = {"model": {"state_dict": state, "iteration": 3}, "epoch": 7}
    assert set(_load(other, tmp_path, nested).unused) == {"epoch", "iteration"}
    assert not _load(other, tmp_path, state).unused


@both_layouts
@pytest.mark.parametrize("within", [None, "model", "model_ema"])
def test_averaged_models(within: str | None, layout: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    state = {f"module.{key}": value for key, value in _state(model, tmp_path, layout).items()}
    state["n_averaged"] = averaged.n_averaged
    if layout == "native":
        assert list(averaged.state_dict()) == ["n_averaged", *list(state)[:-1]]
    report = _load(
        other, tmp_path, {within: state} if within else state, weights="ema" if within == "model_ema" else "model"
    )
    assert report.ignored == ("n_averaged",)
    assert report.notes == ("removed the prefix 'module.'",)
    assert_same_state(other.state_dict(), model.state_dict())


@both_layouts
def test_a_missing_classifier_is_told(layout: str, tmp_path: Path) -> None:
    state = _state(alive("slak_nano"), tmp_path, layout)
    headless = {key: value for key, value in state.items() if not key.startswith("head")}
    other = alive("slak_nano")
    with pytest.warns(UserWarning, match="holds no classifier: the network's is untrained"):
        report = _load(other, tmp_path, headless)
    assert {"head.fc.weight", "head.fc.bias"} <= set(report.missing)
    assert torch.equal(
        other.stem[0].weight, state["stem.0.weight" if layout == "native" else "downsample_layers.0.0.weight"]
    )


def test_a_network_without_classifier_misses_none(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    state = {key: value for key, value in alive("slak_nano").state_dict().items() if not key.startswith("head.fc")}
    _load(create("slak_nano", num_classes=0), tmp_path, state)
    assert not [warning for warning in recwarn if "untrained" in str(warning.message)]


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema"])
def test_files_of_averaged_weights_alone(key: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), alive("slak_nano")
    content = {key: _state(model, tmp_path, "native"), "epoch": 3}
    _refused(other, tmp_path, content, f"holds no weights; its entries are {key}, epoch: load weights='ema'$")
    _load(other, tmp_path, content, weights="ema")
    assert_same_state(other.state_dict(), model.state_dict())


# ---- One weight twice


def test_one_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    """Our names are partly those of the authors, so that a file may mix both."""
    model = alive("replknet_nano")
    state = _state(model, tmp_path, "official")
    official, native = "large_kernel.lkb_origin.conv.weight", "large_kernel.source.kernels.0"
    prefix = "stages.0.blocks.0."
    message = f"holds one weight twice, as {prefix}{official} and as {prefix}{native}: remove one"
    _refused(model, tmp_path, {**state, prefix + native: torch.ones(16, 1, 31, 31)}, message)


MERGED = {
    "slak_nano_square": ("stages.0.0.large_kernel", "lkb_reparam", "lkb_origin.conv.weight", (16, 1, 31, 31)),
    "replknet_nano": ("stages.0.blocks.0.large_kernel", "lkb_reparam", "lkb_origin.conv.weight", (16, 1, 31, 31)),
    "shiftwise_nano": ("stages.0.0.large_kernel", "LoRA", "LoRAs.0.weight", (132, 1, 3, 3)),
}


@pytest.mark.parametrize("merged_first", [False, True])
@pytest.mark.parametrize("name", MERGED)
def test_merged_and_separate_kernels_in_one_file_are_refused(name: str, merged_first: bool, tmp_path: Path) -> None:
    layer, merged, separate, shape = MERGED[name]
    model = alive(name)
    state, more = _state(model, tmp_path, "official"), {f"{layer}.{merged}.weight": torch.ones(shape)}
    if merged == "lkb_reparam":
        more[f"{layer}.{merged}.bias"] = torch.ones(shape[0])
    message = rf"holds weights twice, in two forms: remove one of {layer}\.{separate}"
    _refused(model, tmp_path, {**more, **state} if merged_first else {**state, **more}, message)


# ---- Folded networks


FOLDED_WITH_OFFICIAL = [name for name in NANO if name not in ("slak_pw_nano", "convnext_isotropic_nano")]


@pytest.mark.parametrize("features_only", [False, True], ids=["network", "features"])
@pytest.mark.parametrize("name", FOLDED_WITH_OFFICIAL)
def test_folded_networks_have_no_official_form(name: str, features_only: bool, tmp_path: Path) -> None:
    """Not even where nothing but the layer scale was folded and every name has a place."""
    folded = widekernel.fold(alive(name, features_only=features_only))
    for copied in (folded, copy.deepcopy(folded)):
        with pytest.raises(CheckpointError, match=r"is folded and has no place in an official layout: .*layout='native'"):
            widekernel.save_checkpoint(copied, tmp_path / "a.pth", layout="official")
    assert not list(tmp_path.iterdir())
    assert widekernel.save_checkpoint(folded, tmp_path / "a.safetensors").exists()


def test_official_files_do_not_go_into_folded_networks(tmp_path: Path) -> None:
    state = _state(alive("roadmap_nano"), tmp_path, "official")
    _refused(
        widekernel.fold(alive("roadmap_nano")), tmp_path, {"model": state}, "does not fit: the checkpoint holds ConvNeXt"
    )


# ---- Reading and writing


def test_many_threads_read_one_file(tmp_path: Path) -> None:
    """What may be loaded is a list of the whole process, which reading changes and changes back."""
    model, path = alive("slak_nano"), tmp_path / "a.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    before = list(torch.serialization.get_safe_globals())
    others = [create("slak_nano") for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(4):
            reports = list(pool.map(lambda other: widekernel.load_checkpoint(other, path), others))
            assert {report.unused for report in reports} == {("args",)}
    for other in others:
        assert_same_state(other.state_dict(), model.state_dict())
    assert list(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("written", [0, 100], ids=["nothing", "a_part"])
def test_a_full_disk(written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: Any, file: Path, **kwargs: Any) -> None:
        if written:
            Path(file).write_bytes(bytes(written))
        raise SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be written: .*No space left on device"):
        widekernel.save_checkpoint(create("slak_nano"), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


WRAPPERS = {
    "compiled": torch.compile,
    "data_parallel": nn.DataParallel,
    "compiled_data_parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "data_parallel_compiled": lambda model: nn.DataParallel(torch.compile(model)),
}


@both_layouts
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_networks_are_read_and_written_like_the_inner_one(wrapper: str, layout: Any, tmp_path: Path) -> None:
    wrap, suffix = WRAPPERS[wrapper], {"native": ".safetensors", "official": ".pth"}[layout]
    model, other = alive("slak_nano"), create("slak_nano")
    plain = widekernel.save_checkpoint(model, tmp_path / f"plain{suffix}", layout=layout)
    wrapped = widekernel.save_checkpoint(wrap(model), tmp_path / f"wrapped{suffix}", layout=layout)
    states = [widekernel.models.checkpoint.reader.read_checkpoint(path).state for path in (plain, wrapped)]
    assert_same_state(*states)
    report = widekernel.load_checkpoint(wrap(other), plain)
    assert not report.notes
    assert set(report.loaded) == set(model.state_dict())
    assert_same_state(other.state_dict(), model.state_dict())


# ---- SLaK without strips, merged


def _affine(state: dict[str, Tensor], bn: str) -> tuple[Tensor, Tensor]:
    scale = state.pop(f"{bn}.weight") / (state.pop(f"{bn}.running_var") + 1e-5).sqrt()
    shift = state.pop(f"{bn}.bias") - state.pop(f"{bn}.running_mean") * scale
    del state[f"{bn}.num_batches_tracked"]
    return scale, shift


@pytest.mark.parametrize("small", [3, 7, 0], ids=["small_kernel", "small_kernel_in_some_stages", "one_kernel"])
def test_merged_slak_without_strips(small: int, tmp_path: Path) -> None:
    arguments = {"decomposed": False, "small_kernel": small}
    model, other = (alive("slak_nano", **arguments) for _ in range(2))
    state = _state(model, tmp_path, "official")
    layers = [key.removesuffix(".lkb_origin.conv.weight") for key in state if key.endswith("lkb_origin.conv.weight")]
    for layer in layers:
        scale, bias = _affine(state, f"{layer}.lkb_origin.bn")
        kernel = state.pop(f"{layer}.lkb_origin.conv.weight") * scale.view(-1, 1, 1, 1)
        if f"{layer}.small_conv.conv.weight" in state:
            scale, shift = _affine(state, f"{layer}.small_conv.bn")
            square = state.pop(f"{layer}.small_conv.conv.weight") * scale.view(-1, 1, 1, 1)
            margin = (kernel.shape[-1] - square.shape[-1]) // 2
            kernel, bias = kernel + nn.functional.pad(square, [margin] * 4), bias + shift
        state[f"{layer}.lkb_reparam.weight"], state[f"{layer}.lkb_reparam.bias"] = kernel, bias
    assert len(layers) == 5
    assert not [key for key in state if "small_conv" in key or "lkb_origin" in key]
    report = _load(other, tmp_path, {"model": state})
    assert report.layout == "SLaK"
    assert "5 merged kernels were put into the large branches" in report.notes[0]
    assert not (report.missing or report.ignored or report.dropped)
    assert_near(_logits(other), _logits(model))


# ---- Shortened networks


@both_layouts
@pytest.mark.parametrize("indices", [(0, 1), (1, 3), (2,)], ids=str)
def test_norms_of_maps_that_are_not_handed_out_are_left_in_the_file(
    indices: tuple[int, ...], layout: str, tmp_path: Path
) -> None:
    name = "replknet_nano_feature_norms"
    model, extractor = alive(name), create(name, features_only=True, out_indices=indices)
    state = _state(model, tmp_path, layout)
    report = _load(extractor, tmp_path, state)
    norm = "feature_norms.{}.weight" if layout == "native" else "stages.{}.norm.weight"
    for i in range(4):
        assert (norm.format(i) in report.ignored) == (i not in indices)
    with torch.no_grad():
        want = model.forward_intermediates(images(), indices=list(indices), intermediates_only=True)
        got = extractor.eval()(images())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
