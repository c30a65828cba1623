"""Wrong arguments: one clear message, exit code 2, and nothing is trained."""

import pytest

from widekernel.cli import eval as eval_command
from widekernel.cli.main import main
from widekernel.cli.options import parse_with_data_of_the_run
from widekernel.cli.parsing import parse, parse_given
from widekernel.cli.train import make_parser

DIGITS = ["--data.name", "digits", "--model.name", "test_resnet", "--data.workers", "0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["'trian'", "'train'"]),
        (["train", "--optimzer.lr", "1"], ["--optimzer.lr", "--optimizer.lr"]),
        (["train", "--optimizer.l", "1"], ["--optimizer.l", "--optimizer.lr"]),
        (["train", "--optimizer.lr", "fast"], ["optimizer.lr", "fast"]),
        (["train", "--optimizer.lr", "-1"], ["optimizer.lr is -1.0", "positive"]),
        (["train", "--seed", "1.5"], ["seed", "1.5"]),
        (["train", "--seed", "-1"], ["seed is -1"]),
        (["train", "--seed"], ["--seed", "expected one argument"]),
        (["train", "--recipe"], ["--recipe", "expected one argument"]),
        (["train", "--recipe", "slak_nano_digit"], ["'slak_nano_digits'"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["train", "extra"], ["extra"]),
        (["train", "--output", ""], ["output is ''", "must be a path"]),
        (["train", "--data.input_size", "[32,32]"], ["data.input_size is [32, 32], but must be a whole number or null"]),
        (["train", "--data.mean", "0.5"], ["data.mean is 0.5, but must be a list of numbers such as [0.5, 1] or null"]),
        (["train", "--loop.batch_size", "1e2"], ["loop.batch_size is 100.0, but must be a whole number"]),
        (["train", "--optimizer.clip_mode", "l2"], ["clip_mode", "l2"]),
        (["train", "--optimizer.betas", "[0.9]"], ["optimizer.betas"]),
        (["train", "--schedule.epochs", "0"], ["schedule.epochs is 0"]),
        (["train", "--schedule.epochs", "5"], ["schedule.warmup_epochs is 20", "schedule.epochs (5)"]),
        (["train", "--loop.batch_size", "7"], ["loop.batch_size is 7", "even"]),
        (["train", "--loop.micro_batch", "0"], ["loop.micro_batch is 0"]),
        (["train", "--loop.accumulate", "2"], ["no option --loop.accumulate", "loop.micro_batch the number per forward"]),
        (["train", "--loop.precision", "fp8"], ["precision", "fp8"]),
        (["train", "--checkpoint.keep", "1"], ["checkpoint.keep is 1"]),
        (["train", "--ema.decay", "1"], ["ema.decay is 1.0"]),
        (["train", "--model.pretrained", "true", "--model.weights", "x.pth"], ["model.pretrained", "model.weights"]),
        (["train", "--model.args.num_classes", "3"], ["num_classes", "model.num_classes"]),
        (["train", *DIGITS, "--model.name", "slak_tini"], ["'slak_tini'", "'slak_tiny'"]),
        (["train", *DIGITS, "--model.args.deth", "3"], ["test_resnet", "deth"]),
        (["train", *DIGITS, "--model.num_classes", "5"], ["model.num_classes is 5", "10 classes"]),
        (["train", *DIGITS, "--model.weights", "none.pth"], ["none.pth"]),
        (["train", *DIGITS, "--optimizer.name", "adamv"], ["'adamv'", "adam"]),
        (["train", *DIGITS, "--loop.device", "tpu"], ["'tpu'", "auto"]),
        (["train", *DIGITS, "--loop.device", "cpu", "--loop.precision", "fp16"], ["fp16", "bf16"]),
        (["train", *DIGITS, "--loop.batch_size", "4000"], ["1437 images", "4000"]),
        (["train", "--data.name", "digts"], ["'digts'", "'digits'"]),
        (["train"], ["data.root is not set"]),
        (["eval"], ["source"]),
        (["eval", "nowhere"], ["nowhere does not exist"]),
        (["eval", "."], ["not a run folder"]),
        (["eval", "nowhere", "--weights", "swa"], ["swa"]),
        (["fold", "nowhere", "--output", "x.pth"], [".safetensors"]),
        (["models", "slok"], ["'slok'"]),
        (["models", "--al"], ["--al", "--all"]),
        (["complexity", "slak_tini"], ["'slak_tiny'"]),
        (["complexity", "slak_nano", "--input_size", "0"], ["input_size is 0"]),
        (["recipes", "--x"], ["--x"]),
        (["demo", "--sed", "1"], ["--sed", "--seed"]),
        (["train", "--lr", "1"], ["no option --lr", "'--optimizer.lr'"]),
        (["train", "--loop.epochs", "1"], ["no option --loop.epochs", "'--schedule.epochs'"]),
    ],
    ids=lambda value: " ".join(value)[:70] if value and value[0] in
    {"train", "trian", "eval", "fold", "models", "complexity", "recipes", "demo"} else "",
)  # fmt: skip
def test_wrong_arguments(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    message = captured.err
    assert captured.out == ""
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert not list(tmp_path.rglob("*.pt")), "something was trained"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer: {learning_rate: 1}", ["optimizer.learning_rate"]),
        ("optimiser: {lr: 1}", ["optimiser.lr", "'optimizer.lr'"]),
        ("epochs: 3", ["'epochs'"]),
        ("- a\n- b", ["list"]),
        ("a: [", ["not valid YAML"]),
        ("config: other.yaml", ["unknown key 'config'"]),
        ("print_config: true", ["unknown key 'print_config'"]),
        ("optimizer: 3", ["optimizer"]),
        ("schedule: {epochs: many}", ["schedule.epochs", "many"]),
        ("\x00\x01", ["YAML"]),
    ],
)
def test_wrong_files(text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", "--config", "run.yaml"]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message, message


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", *DIGITS, "--output", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert main(["train", *DIGITS, "--output", str(tmp_path)]) == 2
    assert "without its config.yaml" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("train", "eval", "fold", "models", "recipes", "complexity", "demo"):
        assert f"  {command} " in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("widekernel 0.")
    assert main([]) == 2


@pytest.mark.parametrize("command", ["train", "eval", "fold", "models", "recipes", "complexity", "demo"])
def test_help_of_commands(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert f"widekernel {command}" in capsys.readouterr().out


def test_models_lists_sizes(capsys):
    assert main(["models", "slak_*nano"]) == 0
    text = capsys.readouterr().out
    assert "slak_nano" in text
    assert "64×64" in text
    assert "replknet" not in text


def test_given_values_are_those_of_the_command_line():
    arguments = ["--optimizer.lr", "1", "--config", "a.yaml", "--config", "b.yaml", "--model.args.depth", "3"]
    given = parse_given(make_parser(), arguments)
    assert given == {"optimizer": {"lr": 1.0}, "config": ["a.yaml", "b.yaml"], "model": {"args": {"depth": 3}}}


def test_arguments_of_a_model_add_to_those_of_a_layer_or_replace_them():
    layer = {"model": {"args": {"depth": 3}}, "optimizer": {"lr": 2}}
    values = parse(make_parser(), ["--model.args.width", "4", "--optimizer.eps", "1"], [layer])
    assert values["model"]["args"] == {"depth": 3, "width": 4}
    assert (values["optimizer"]["lr"], values["optimizer"]["eps"]) == (2.0, 1.0)
    assert parse(make_parser(), ["--model.args", "{}"], [layer])["model"]["args"] == {}


def test_lists_add_once_to_those_of_a_layer():
    layer = {"sparsity": {"dynamic": {"exclude": ["head"]}}}
    arguments = ["--sparsity.dynamic.exclude+", "stem"]
    assert parse(make_parser(), arguments)["sparsity"]["dynamic"]["exclude"] == ["stem"]
    assert parse(make_parser(), arguments, [{}])["sparsity"]["dynamic"]["exclude"] == ["stem"]
    assert parse(make_parser(), arguments, [layer])["sparsity"]["dynamic"]["exclude"] == ["head", "stem"]


@pytest.mark.parametrize(
    ("arguments", "is_named"),
    [([], False), (["--data.root", "null"], False), (["--data.root", "x"], True), (["--data.name", "folder"], True)],
)
def test_data_are_named_by_a_root_or_a_name(arguments, is_named):
    values, named = parse_with_data_of_the_run(eval_command.make_parser(), ["slak_nano", *arguments], "eval")
    assert (values["source"], named) == ("slak_nano", is_named)


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        ("1000", ["loop.batch_size is 128", "1000 processes"]),
        ("64", ["--processes is 64", "at most"]),
        ("3", ["126 or 129"]),
    ],
)
def test_too_many_processes_are_not_started(processes, words, capsys, monkeypatch):
    monkeypatch.setattr("widekernel.cli.launching.launch", lambda *_: pytest.fail("started processes"))
    monkeypatch.setattr("widekernel.cli.launching.processors", lambda: 2)
    assert main(["train", "--processes", processes]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words)
