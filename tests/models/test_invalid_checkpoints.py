"""Files that cannot be loaded or written: the error is clear, and the model is unchanged."""

from __future__ import annotations

import builtins
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import widekernel
from tests.models.checkpoints import assert_refused, state_of
from tests.models.zoo import ALIKE, NANO, alive, create
from widekernel.errors import CheckpointError
from widekernel.file_types import describe_file_type
from widekernel.models.checkpoint import saving

# How an error names each network, that of the file and that of the model.
FAMILY = {
    "convnext_isotropic_nano": "isotropic ConvNeXt",
    "replknet_nano": "RepLKNet",
    "roadmap_nano": "step of widekernel's roadmap",
    "shiftwise_nano": "ShiftWise_v2",
    "shiftwise_v1_nano": "ShiftWise_v1",
    "slak_nano": "SLaK",
    "slak_pw_nano": "SLaK_pw",
    "slak_pww_nano": "SLaK_pww",
    "slak_reg_nano": "SLaK_reg",
    "unireplknet_nano": "UniRepLKNet",
}
OFFICIAL = [
    *("convnext_isotropic_nano", "replknet_nano", "shiftwise_nano", "shiftwise_v1_nano", "slak_nano", "slak_pww_nano"),
    "unireplknet_nano",
]


def _saved(folder: Path, content: Any, name: str = "file.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


# ---- The file itself


def test_missing_file(tmp_path: Path) -> None:
    assert_refused(create("slak_nano"), tmp_path / "none.pth", "there is no checkpoint at")
    assert_refused(create("slak_nano"), tmp_path / "none.safetensors", "there is no checkpoint at")


def test_folder(tmp_path: Path) -> None:
    assert_refused(create("slak_nano"), tmp_path, "is a folder: give the path of a checkpoint file")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    "content",
    [b"", bytes(range(256)) * 64, b"\x00" * 1000, b"PK\x03\x04" + bytes(200)],
    ids=["empty", "random", "zeros", "start_of_a_zip"],
)
def test_not_a_checkpoint(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    assert_refused(create("slak_nano"), path, "is damaged, cut off or not a (checkpoint|safetensors file)")


OTHER_FILES = {
    "yaml": (b"model: slak_tiny\ndata: {size: 224}\n", "text that starts with 'model: slak_tiny'"),
    "yaml_that_starts_like_a_pickle": (b"classes: 10\nname: x\n", "text that starts with 'classes: 10'"),
    "json": (b'{"epoch": 3}', "text that starts with '{"),
    "text": ("weights, honestly – é\n".encode() * 100, "text that starts with 'weights, honestly"),
    "page": (b"<!DOCTYPE html><html>404</html>", "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "a picture"),
}


@pytest.mark.parametrize("suffix", [".pth", ".yaml", ".safetensors"])
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_error_names_the_type_of_other_files(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    content, looks = OTHER_FILES[kind]
    path.write_bytes(content)
    message = assert_refused(create("slak_nano"), path, r"is not a checkpoint: it looks like .*torch\.save .*\.safetensors")
    assert looks in message


def test_safetensors_under_another_name(tmp_path: Path) -> None:
    path = widekernel.save_checkpoint(create("slak_nano"), tmp_path / "a.safetensors").rename(tmp_path / "a.bin")
    assert_refused(create("slak_nano"), path, "looks like a safetensors file under another name.*ends in .safetensors")


def test_type_of_unreadable_files_is_unknown(tmp_path: Path) -> None:
    assert describe_file_type(tmp_path) == describe_file_type(tmp_path / "none") == ""


def test_old_text_pickles_are_not_called_text(tmp_path: Path) -> None:
    state = alive("slak_nano").state_dict()
    torch.save(state, tmp_path / "a.pth", pickle_protocol=0, _use_new_zipfile_serialization=False)
    assert_refused(
        create("slak_nano"), tmp_path / "a.pth", "cannot be read here: it keeps .* as files of pickle protocol 0 do"
    )
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:60])
    assert_refused(create("slak_nano"), tmp_path / "a.pth", "is damaged, cut off or not a checkpoint")


def test_masks_of_another_shape(tmp_path: Path) -> None:
    state = dict(create("slak_nano").state_dict())
    weight = state.pop("head.fc.weight")
    state["head.fc.weight_orig"] = weight
    for shape in ((3, 5), weight.shape[1:]):
        state["head.fc.weight_mask"] = torch.ones(shape)
        message = assert_refused(create("slak_nano"), _saved(tmp_path, state), r"head\.fc\.weight_orig has shape")
        assert f"{tuple(weight.shape)} but head.fc.weight_mask has {tuple(shape)}" in message


@pytest.mark.parametrize("names", [("model",), ("model", "state_dict")])
def test_recursive_entries(names: tuple[str, ...], tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    inner = content
    for name in names[1:]:
        inner = inner.setdefault(name, {})
    inner[names[0]] = content
    assert_refused(create("slak_nano"), _saved(tmp_path, content), "holds entries within entries, more than 8 deep")


@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("kept", [1, 8, 100, 0.25, 0.5, 0.9, 0.999, -1])
def test_truncated(layout: Any, kept: float, tmp_path: Path) -> None:
    path = tmp_path / ("whole.safetensors" if layout == "native" else "whole.pth")
    content = widekernel.save_checkpoint(alive("slak_nano"), path, layout=layout).read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert_refused(create("slak_nano"), path, "is damaged, cut off or not a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds a Tensor, not a state dict"),
        ([torch.ones(3)], "holds a list, not a state dict"),
        ({}, "holds no weights; its entries are none"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "holds no weights; its entries are epoch, args"),
        ({"model": {}}, "holds no weights"),
        (
            {"fc.weight": torch.ones(3)},
            "holds an unknown network, but the model is a SLaK.*First keys of the file: fc.weight",
        ),
    ],
    ids=["tensor", "list", "nothing", "no_weights", "empty_model", "foreign"],
)
def test_file_without_a_network(content: Any, message: str, tmp_path: Path) -> None:
    assert_refused(create("slak_nano"), _saved(tmp_path, content), message)


# ---- Pickles that run code


class _Attack:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


class _Custom:
    pass


# Objects beside the weights are replaced by placeholders: see test_safe_reading.py.
@pytest.mark.parametrize(
    ("where", "kind"),
    [
        (where, kind)
        for where in ("entry", "state_dict", "bare_pickle")
        for kind in ("os.system", "eval", "exec", "custom_class", "whole_model")
        if where != "entry" or kind in ("os.system", "eval", "exec")
    ],
)
def test_nothing_in_a_file_is_executed(kind: str, where: str, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    attack: Any = {
        "os.system": lambda: _Attack(os.system, f"touch {trace}"),
        "eval": lambda: _Attack(builtins.eval, f"open({str(trace)!r}, 'w')"),
        "exec": lambda: _Attack(builtins.exec, f"open({str(trace)!r}, 'w')"),
        "custom_class": _Custom,
        "whole_model": lambda: create("slak_nano"),
    }[kind]()
    state = create("slak_nano").state_dict()
    path = tmp_path / "file.pth"
    if where == "bare_pickle":
        path.write_bytes(pickle.dumps(attack, protocol=2))
    else:
        torch.save({"model": state, "args": attack} if where == "entry" else {"model": {**state, "x": attack}}, path)
    message = assert_refused(
        create("slak_nano"), path, "holds more than tensors and could run code when loaded; it was not opened"
    )
    assert "torch.save(model.state_dict(), path)" in message
    assert "add_safe_globals" not in message
    assert not trace.exists()


def test_pickles_of_newer_protocols_are_not_executed_either(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(pickle.dumps(_Attack(os.system, f"touch {tmp_path / 'executed'}"), protocol=4))
    assert_refused(create("slak_nano"), path, "not a checkpoint .*nothing in it was run")
    assert not (tmp_path / "executed").exists()


# ---- Another network


@pytest.mark.parametrize(
    ("name", "file"),
    [
        pytest.param(name, file, marks=[pytest.mark.slow] if {name, file} & set(ALIKE) else [])
        for name in NANO
        for file in NANO
    ],
)
def test_another_family(name: str, file: str, tmp_path: Path) -> None:
    path = widekernel.save_checkpoint(create(file), tmp_path / "a.safetensors")
    model = create(name)
    if file == name:
        assert widekernel.load_checkpoint(model, path).layout == "native"
        return
    message = assert_refused(
        model, path, "does not fit: the checkpoint holds .*, but the model is a .*create the matching model"
    )
    theirs, ours = message.split(", but the model is ")
    assert theirs.endswith(FAMILY[file])
    assert f"{FAMILY[name]})" in ours


@pytest.mark.parametrize("file", OFFICIAL)
def test_another_family_in_its_official_layout(file: str, tmp_path: Path) -> None:
    path = widekernel.save_checkpoint(create(file), tmp_path / "a.pth", layout="official")
    for name in NANO:
        if name != file and (file, name) != ("slak_nano", "slak_reg_nano"):
            message = assert_refused(create(name), path, f"the checkpoint holds {FAMILY[file]}, but the model is a ")
            assert f"{FAMILY[name]})" in message


@pytest.mark.parametrize(
    "name", ["replknet_nano", "shiftwise_nano", "shiftwise_v1_nano", "slak_nano", "slak_reg_nano", "unireplknet_nano"]
)
def test_folded_and_training_form(name: str, tmp_path: Path) -> None:
    model = alive(name)
    folded = widekernel.fold(model)
    of_training = widekernel.save_checkpoint(model, tmp_path / "training.safetensors")
    of_folded = widekernel.save_checkpoint(folded, tmp_path / "folded.safetensors")
    assert_refused(model, of_folded, r"holds a folded .*, but the model is a .*: fold the model before loading this file")
    assert_refused(folded, of_training, r"the model is a \w+ \(a folded .*: load the weights before folding the model")
    if name == "unireplknet_nano":  # its official code has a merged form
        return
    with pytest.raises(CheckpointError, match="is folded and has no place in an official layout: save with layout='native'"):
        widekernel.save_checkpoint(folded, tmp_path / "folded.pth", layout="official")


def test_keys_of_folded_roadmap_networks_are_named(tmp_path: Path) -> None:
    path = widekernel.save_checkpoint(widekernel.fold(alive("roadmap_nano")), tmp_path / "folded.safetensors")
    message = assert_refused(create("roadmap_nano"), path, "does not fit the Roadmap; nothing was loaded")
    assert message.count("gamma: the file holds no such weight") == 5


# ---- The right family, but not the same network


@pytest.mark.parametrize("layout", ["native", "official"])
def test_missing_and_unexpected_keys_and_shapes_are_all_named(layout: str, tmp_path: Path) -> None:
    model = create("slak_nano")
    state = dict(model.state_dict()) if layout == "native" else state_of(create("slak_nano"), tmp_path, "official")
    missing = [key for key in state if key.endswith("pwconv1.weight" if layout == "official" else "mlp.fc1.weight")]
    wrong = next(key for key in state if key.endswith("gamma"))
    for key in missing:
        del state[key]
    state[wrong] = torch.ones(3)
    state["stages.0.surplus"] = torch.ones(1)
    message = assert_refused(model, _saved(tmp_path, {"model": state}), "does not fit the SLaK; nothing was loaded")
    lines = [line.strip() for line in message.splitlines()[1:]]
    assert f"{wrong} has shape (3,) but the network's is (16,)" in lines
    assert "stages.0.surplus: the network has no such weight" in lines
    for stage, block in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0)):
        assert f"stages.{stage}.blocks.{block}.mlp.fc1.weight: the file holds no such weight" in lines
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("slak_nano", {"kernel_sizes": (31, 15, 9, 5)}),
        ("slak_nano", {"decomposed": False}),
        ("slak_nano", {"bn": False}),
        ("slak_nano", {"depths": (1, 1, 3, 1)}),
        ("replknet_nano", {"dims": (16, 32, 64, 96)}),
        ("shiftwise_nano", {"ghost_ratio": 0.5}),
        ("shiftwise_nano", {"paths": 1}),
        ("slak_nano", {"in_chans": 1}),
        ("unireplknet_nano", {"kernel_sizes": (3, 13, (3, 13), 7)}),
    ],
    ids=["kernels", "squares", "bn", "depths", "dims", "ghosts", "paths", "channels", "order"],
)
@pytest.mark.parametrize("layout", ["native", "official"])
def test_other_architectures_of_one_family(name: str, arguments: dict[str, Any], layout: Any, tmp_path: Path) -> None:
    path = tmp_path / ("a.safetensors" if layout == "native" else "a.pth")
    widekernel.save_checkpoint(create(name, **arguments), path, layout=layout)
    assert_refused(create(name), path, r"nothing was loaded:\n  ")


def test_classifiers_of_another_width_are_an_error(tmp_path: Path) -> None:
    state = dict(create("slak_nano").state_dict())
    state["head.fc.weight"] = torch.ones(1000, 64)
    assert_refused(create("slak_nano"), _saved(tmp_path, state), r"head\.fc\.weight has shape \(1000, 64\)")


def test_no_averaged_weights(tmp_path: Path) -> None:
    state = create("slak_nano").state_dict()
    for content in ({"model": state, "epoch": 3}, {"model": state, "model_ema": None}, state):
        path = _saved(tmp_path, content)
        assert_refused(create("slak_nano"), path, r"holds no averaged \(EMA\) weights.*load weights='model'", weights="ema")
    save_file(state, tmp_path / "a.safetensors")
    assert_refused(create("slak_nano"), tmp_path / "a.safetensors", "holds one set of weights", weights="ema")


def test_unknown_choice_of_weights(tmp_path: Path) -> None:
    path = _saved(tmp_path, create("slak_nano").state_dict())
    assert_refused(create("slak_nano"), path, "weights='best' is unknown: it must be 'model' or 'ema'", weights="best")


# ---- Writing


def test_suffixes_and_layouts(tmp_path: Path) -> None:
    model = create("slak_nano")
    for name, layout, message in (
        ("a.pth", "native", r"a\.pth must end in \.safetensors for layout 'native'"),
        ("a", "native", r"must end in \.safetensors"),
        ("a.safetensors", "official", r"must end in \.pth or \.pt for layout 'official'"),
        ("a.pth", "authors", "layout 'authors' is unknown: it must be 'native' or 'official'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            widekernel.save_checkpoint(model, tmp_path / name, layout=layout)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no place for metadata"):
        widekernel.save_checkpoint(model, tmp_path / "a.pth", layout="official", metadata={"epoch": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "layout"), [(".safetensors", "native"), (".pth", "official")])
def test_unwritable_paths(suffix: str, layout: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / f"folder{suffix}").mkdir()
    for path in (tmp_path / "file" / f"a{suffix}", tmp_path / "file" / "b" / f"a{suffix}", tmp_path / f"folder{suffix}"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            widekernel.save_checkpoint(create("slak_nano"), path, layout=layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", f"folder{suffix}"]
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize(("suffix", "layout"), [(".safetensors", "native"), (".pth", "official")])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("broken pipe")])
def test_an_interrupted_write_leaves_the_old_file(
    suffix: str, layout: Any, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = widekernel.save_checkpoint(alive("slak_nano"), tmp_path / f"a{suffix}", layout=layout)
    before = path.read_bytes()

    def half(state: Any, file: Path, **kwargs: Any) -> None:
        Path(file).write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(saving, "save_file", half)
    monkeypatch.setattr(torch, "save", half)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected):
        widekernel.save_checkpoint(alive("slak_nano"), path, layout=layout)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
