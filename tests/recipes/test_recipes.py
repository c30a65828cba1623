import dataclasses
from pathlib import Path

import pytest
import timm

import widekernel  # noqa: F401 - registers the models
from widekernel.cli import eval as evaluation
from widekernel.cli import sparsify
from widekernel.cli.options import parse_with_data_of_the_run
from widekernel.cli.parsing import FREE_KEYS, known_keys
from widekernel.cli.train import make_parser, parse_config
from widekernel.errors import ConfigError
from widekernel.recipes import Devices, list_recipes, load_base, load_recipe
from widekernel.settings import flatten
from widekernel.tasks.classification.config import TrainConfig
from widekernel.tasks.config import FIRST_TASK

FIELDS = {field.name for field in dataclasses.fields(TrainConfig)}
TRAINED = [
    name
    for name in list_recipes()
    if load_recipe(name).command == "train"
    and (load_recipe(name).task != FIRST_TASK or load_recipe(name).settings.keys() <= FIELDS)
]
SAMPLE = [
    "convnext_tiny_coco_36e_800_maskrcnn",
    "replknet_31b_cityscapes_20k_769",
    "replknet_31l_in22k_90e_224",
    "shiftwise_tiny_in1k_300e_224",
    "slak_nano_digits",
]


@pytest.mark.parametrize("name", list_recipes())
def test_fields(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description.endswith(".") and recipe.dataset
    assert timm.is_model(recipe.model)
    assert name.startswith(recipe.model)
    if recipe.family != "demo":
        data = {"ImageNet-1K": "in1k", "ImageNet-22K": "in22k"}.get(recipe.dataset, recipe.dataset.lower())
        length = "" if recipe.epochs is None else f"{recipe.epochs}e_"
        length = length if recipe.steps is None else f"{recipe.steps // 1000}k_"
        size = min(recipe.settings["data"]["image_scale"]) if recipe.task == "detection" else recipe.input_size
        assert name.startswith(f"{recipe.model}_{data}_{length}{size}")
        assert recipe.source is not None and recipe.source.file and recipe.verified == "none"
    assert all(note.endswith((".", "'")) for note in recipe.notes)


def test_numbers_are_no_text() -> None:
    """YAML reads 1e-8 as text; 1.0e-8 is the number."""
    for name in list_recipes():
        for key, value in flatten(load_recipe(name).settings).items():
            texts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
            assert not [text for text in texts if text[0].isdigit()], (name, key, value)


@pytest.mark.parametrize("name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in TRAINED])
def test_every_recipe_is_a_valid_configuration(name: str) -> None:
    recipe = load_recipe(name)
    known = known_keys(make_parser(recipe.task))
    settings = flatten(recipe.settings, FREE_KEYS)
    assert settings.keys() <= known
    config = parse_config(["--recipe", name])
    assert config.task == recipe.task
    flat = flatten(config.to_dict(), FREE_KEYS)
    for key, value in settings.items():
        assert flat[key] == value, key


@pytest.mark.parametrize("name", ["replknet_xl_in1k_320_eval", "resnet18_in1k_224_2to4_permuted"])
def test_settings_of_other_commands(name: str) -> None:
    recipe = load_recipe(name)
    parser = (evaluation if recipe.command == "eval" else sparsify).make_parser()
    assert flatten(recipe.settings_for(recipe.command)).keys() <= known_keys(parser)
    with pytest.raises(ConfigError, match=f"is for `widekernel {recipe.command}`, not for `widekernel train`"):
        parse_config(["--recipe", name])
    data = ["--data.root", "images", "--data.input_size", "64"]
    values, has_data = parse_with_data_of_the_run(parser, ["x.pth", "--recipe", name, *data], recipe.command)
    assert has_data and values["model"] == recipe.model
    expected = {**recipe.settings["data"], "root": "images", "input_size": 64}
    for key, value in expected.items():
        assert values["data"][key] == (tuple(value) if isinstance(value, list) else value), key


def test_a_run_needs_neither_model_nor_data_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {root: images, crop_pct: 0.9}\n")
    values, has_data = parse_with_data_of_the_run(
        evaluation.make_parser(), [str(tmp_path), "--recipe", "slak_tiny_in1k_300e_224"], "eval"
    )
    assert has_data and (values["model"], values["model_args"]) == (None, None)
    assert (values["data"]["root"], values["data"]["crop_pct"], values["data"]["input_size"]) == ("images", 0.9, 224)
    values, has_data = parse_with_data_of_the_run(
        sparsify.make_parser(), ["x.pth", "--recipe", "resnet18_in1k_224_2to4_magnitude"], "sparsify"
    )
    assert not has_data and values["data"]["input_size"] is None and values["axis"] == "channels"


def test_bases() -> None:
    base = load_base("convnext_finetuning")
    assert base["source"]["file"] == "TRAINING.md"
    assert (base["settings"]["optimizer"]["lr"], base["settings"]["optimizer"]["weight_decay"]) == (5e-5, 1e-8)
    assert base["settings"]["augment"]["erase_prob"] == 0.25  # of the base of its base
    with pytest.raises(ConfigError, match="no base 'convnet'"):
        load_base("convnet")


def test_notes_follow_those_of_the_base() -> None:
    notes = load_recipe("slak_pw_tiny_in1k_120e_224_coarse_pad_half_k").notes
    assert [note.split()[:2] for note in notes] == [["The", "table"], ["Sparsity,", "interval"], ["The", "table"]]
    assert "K // 2" in notes[-1]


def test_wrong_batches_are_refused() -> None:
    recipe = load_recipe("slak_tiny_in1k_300e_224")
    with pytest.raises(ConfigError, match=r"total_batch is 2048, but must be 4096 \(4 GPUs × 128 images × 8 passes\)"):
        dataclasses.replace(recipe, total_batch=2048)
    with pytest.raises(ConfigError, match=r"loop.batch_size is 4096, but must be total_batch"):
        dataclasses.replace(recipe, devices=Devices(1, 4, 64, 8), total_batch=2048)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'slak_nano_digits'"):
        load_recipe("slak_nano_digit")


def test_recipe_then_file_then_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("schedule: {epochs: 7}\nloop: {batch_size: 10}\nmodel: {args: {drop_path_rate: 0.3}}\n")
    recipe = parse_config(["--recipe", "slak_nano_digits"])
    config = parse_config(
        ["--loop.batch_size", "12", "--config", str(file), "--recipe=slak_nano_digits", "--model.args.drop_rate", "0.1"]
    )
    assert config.optimizer == recipe.optimizer
    assert config.schedule.epochs == 7
    assert config.loop.batch_size == 12
    assert config.model.args == {"drop_path_rate": 0.3, "drop_rate": 0.1}
    assert config.output == "runs/slak_nano_digits"


def test_later_files_win(tmp_path):
    for index, epochs in enumerate((5, 6)):
        (tmp_path / f"{index}.yaml").write_text(f"schedule: {{epochs: {epochs}, warmup_epochs: {index}}}\n")
    config = parse_config(["--config", str(tmp_path / "1.yaml"), "--config", str(tmp_path / "0.yaml")])
    assert config.schedule.epochs == 5
    assert config.schedule.warmup_epochs == 0


def test_a_file_can_name_the_recipe(tmp_path):
    (tmp_path / "run.yaml").write_text("recipe: slak_nano_digits\nseed: 3\n")
    config = parse_config(["--config", str(tmp_path / "run.yaml")])
    assert (config.data.name, config.seed) == ("digits", 3)
    assert parse_config(["--config", str(tmp_path / "run.yaml"), "--data.name", "folder"]).data.name == "folder"


def test_the_configuration_of_a_run_can_be_used_again(tmp_path):
    import yaml

    config = parse_config(["--recipe", "slak_nano_digits", "--model.args.drop_path_rate=0.2", "--output", "x"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_printed_settings_are_a_file_for_the_same_run(tmp_path, capsys):
    from widekernel.cli.main import main

    arguments = ["--recipe", "slak_nano_digits", "--seed", "3", "--model.args.drop_path_rate=0.2"]
    assert main(["train", *arguments, "--print_config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse_config(["--config", str(tmp_path / "printed.yaml")]) == parse_config(arguments)
