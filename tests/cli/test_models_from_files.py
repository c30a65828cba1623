"""The kinds of models that `eval` and `fold` accept, and the options of each kind."""

import json

import pytest
import torch
from tests.data.test_sources import GOOD, fill

from widekernel import save_checkpoint
from widekernel.cli.main import main
from widekernel.data import Preprocessing
from widekernel.engine.checkpoint import CheckpointStore
from widekernel.tasks.assembly import build_model
from widekernel.tasks.saved import SavedModel, save_model

ARGS = {"width_factor": 0.5}
SAVED = SavedModel(
    "slak_nano", ARGS, "training", 2, ("cat", "dog"), Preprocessing(64, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write one network as an official checkpoint, a described file and a training state, and images."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = build_model("slak_nano", 2, ARGS)
    save_checkpoint(model, folder / "net.pth", layout="official")
    save_model(model, folder / "net.safetensors", SAVED)
    average = {key: value + 1 if key == "head.fc.bias" else value for key, value in model.state_dict().items()}
    average["head.fc.bias"][0] += 1e6
    for step, ema in ((3, average), (4, None)):
        state = {"model": model.state_dict(), "ema": ema, "saved_model": SAVED.to_dict()}
        CheckpointStore(folder / "checkpoints").save_now(state, step, None)
    fill(folder, GOOD)
    return folder


def evaluate(files, capsys, *arguments):
    capsys.readouterr()
    data = ["--data.root", str(files), "--data.workers", "0", "--data.input_size", "64", "--device", "cpu", "--json"]
    assert main(["eval", *arguments, *data]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", [["--model_args", json.dumps(ARGS)], ["--model_args.width_factor", "0.5"]])
def test_arguments_of_a_model(files, capsys, form, tmp_path):
    named = [str(files / "net.pth"), "--model", "slak_nano", "--num_classes", "2", *form]
    assert evaluate(files, capsys, *named)["images"] == 2
    assert main(["fold", *named, "--output", str(tmp_path / "folded.safetensors")]) == 0
    assert evaluate(files, capsys, str(tmp_path / "folded.safetensors"), "--data.name", "folder")["images"] == 2


def test_training_states(files, capsys, tmp_path):
    state = str(files / "checkpoints" / "step-00000003.pt")
    plain = evaluate(files, capsys, state)
    assert plain == evaluate(files, capsys, str(files / "net.safetensors"))
    averaged = evaluate(files, capsys, state, "--weights", "ema")
    assert averaged["top1"] == 50
    assert averaged["loss"] > 1e5
    assert main(["eval", str(files / "checkpoints" / "step-00000004.pt"), "--weights", "ema"]) == 2
    assert "holds no averaged weights" in capsys.readouterr().err


def test_folded_files_are_named_after_their_weights(files, capsys):
    state = str(files / "checkpoints" / "step-00000003.pt")
    assert main(["fold", state]) == 0
    assert main(["fold", state, "--weights", "ema"]) == 0
    names = {path.name for path in (files / "checkpoints").glob("*.safetensors")}
    assert names == {"step-00000003_folded.safetensors", "step-00000003_ema_folded.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["net.safetensors", "--state", "best"], ["--state", "is a file"]),
        (["net.safetensors", "--num_classes", "3"], ["--num_classes", "add --model NAME"]),
        (["net.safetensors", "--model_args", '{"width_factor": 2}'], ["--model_args", "add --model NAME"]),
        (["checkpoints/step-00000004.pt", "--num_classes", "3"], ["--num_classes", "add --model NAME"]),
        (["train", "--model", "slak_nano", "--num_classes", "3"], ["--model and --num_classes", "run folder"]),
        (["net.pth"], ["--model NAME"]),
        (["net.pth", "--model", "slak_nano", "--model_args", "3"], ["model_args"]),
        (["net.pth", "--model", "slak_nano", "--model_args", '{"wdth": 3}'], ["slak_nano", "wdth"]),
    ],
    ids=lambda value: " ".join(value),
)
@pytest.mark.parametrize("command", ["eval", "fold"])
def test_options_that_do_not_apply(files, capsys, command, arguments, words):
    assert main([command, str(files / arguments[0]), *arguments[1:]]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for word in words:
        assert word in message
