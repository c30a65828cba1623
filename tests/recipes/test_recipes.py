import pytest
import timm

import widekernel  # noqa: F401 - registers the models
from widekernel.cli.parsing import FREE_KEYS, known_keys
from widekernel.cli.train import make_parser, parse_config
from widekernel.errors import ConfigError
from widekernel.recipes import list_recipes, load_recipe
from widekernel.settings import flatten


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_a_valid_configuration(name):
    recipe = load_recipe(name)
    known = known_keys(make_parser())
    settings = flatten(recipe.settings, FREE_KEYS)
    assert settings.keys() <= known
    config = parse_config(["--recipe", name])
    assert timm.is_model(config.model.name)
    assert recipe.description.endswith(".")
    flat = flatten(config.to_dict(), FREE_KEYS)
    for key, value in settings.items():
        assert flat[key] == value, key


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
