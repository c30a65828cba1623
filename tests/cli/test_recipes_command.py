"""The command that lists recipes, and shows one."""

from __future__ import annotations

import json

import pytest
import yaml

from widekernel.cli.main import main
from widekernel.cli.train import parse_config
from widekernel.recipes import list_recipes


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    code = main(["recipes", *arguments])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["recipes", *arguments]) == 2
    return capsys.readouterr().err


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys).splitlines()
    for name in list_recipes():
        assert sum(f" {name} " in line for line in lines) == 1, name
    rows = {line.split()[1]: line.replace("│", "").split() for line in lines if line.startswith("│")}
    assert rows["slak_base_in1k_300e_224"][1:] == ["slak_base", "ImageNet-1K", "300e", "224", "84.0", "top-1", "–"]
    assert rows["slak_nano_digits"][1:] == ["slak_nano", "digits", "12e", "–", "–", "yes"]
    assert rows["slak_base_ade20k_160k_512"][1:] == ["slak_base", "ADE20K", "160k", "512", "50.0", "mIoU", "–"]
    published = ["53.9", "box", "AP,", "46.5", "mask", "AP"]
    assert rows["replknet_31l_coco_36e_800_cascade_from_in22k"][1:] == ["replknet_31l", "COCO", "36e", "–", *published, "–"]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["resnet18*"], {"resnet18"}),
        (["--family", "roadmap", "--model", "*convnext*"], {"roadmap_13_convnext_t"}),
        (["--dataset", "imagenet-22k", "--model", "replknet*"], {"replknet_31b", "replknet_31l"}),
        (["--command", "eval"], {"replknet_xl"}),
        (["--verified"], {"slak_nano"}),
        (
            ["--task", "segmentation", "--model", "[rs]*l*k*"],
            {"replknet_31b", "replknet_31l", "replknet_xl", "slak_base", "slak_small", "slak_tiny"},
        ),
        (["--task", "segmentation", "--model", "unireplknet_[ts]"], {"unireplknet_t", "unireplknet_s"}),
        (["--task", "detection", "*fcos*"], {"replknet_31b"}),
        (["--dataset", "cityscapes"], {"replknet_31b"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_filters(filters: list[str], expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["model"] for row in json.loads(said(capsys, *filters, "--json"))} == expected


def test_json_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(said(capsys, "--json"))
    assert [row["name"] for row in rows] == list_recipes()
    row = next(row for row in rows if row["name"] == "replknet_31b_in1k_300e_224")
    assert row["published"] == {"top1": 83.5} and row["devices"] == {"nodes": 4, "gpus": 8, "batch": 64, "accumulation": 1}


def test_one_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    name = "convnext_large_in1k_30e_384_from_in1k"
    text = said(capsys, name)
    assert "source        facebookresearch/ConvNeXt@048efcea897d, TRAINING.md\n" in text
    assert "batch         512 images: 2 × 8 GPUs × 32 images\n" in text
    assert "note          The published run started from the averaged weights" in text
    settings = text.partition("\nsettings\n")[2].partition("\n\n")[0]
    expected = parse_config(["--recipe", name]).to_dict()
    del expected["output"]
    assert yaml.safe_load(settings) == expected
    defaults, base = text.partition("differs from the defaults\n")[2].split("differs from the base convnext_finetuning\n")
    assert "  optimizer.lr: 5e-05 (default: 0.004)\n" in defaults and "augment.hflip" not in defaults
    assert "  data.input_size: 384 (base: 224)\n" in base and "optimizer.lr" not in base


def test_one_recipe_of_another_task(capsys: pytest.CaptureFixture[str]) -> None:
    name = "replknet_31b_coco_24e_800_fcos"
    text = said(capsys, name)
    assert "published     box_AP 47.0\n" in text and "weights       replknet_31b.in1k_ft_coco_fcos\n" in text
    assert "batch         16 images: 8 GPUs × 2 images\n" in text
    settings = yaml.safe_load(text.partition("\nsettings\n")[2].partition("\n\n")[0])
    expected = parse_config(["--recipe", name]).to_dict()
    del expected["output"]
    assert settings == expected and settings["task"] == "detection"
    details = json.loads(said(capsys, name, "--json"))
    assert details["checkpoint"] == "replknet_31b.in1k_ft_coco_fcos"
    assert details["deviations"]["from_base"]["schedule.milestones"] == {"value": [16, 22], "base": [27, 33]}
    assert "task" not in details["deviations"]["from_defaults"]


def test_one_recipe_of_another_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "resnet18_in1k_224_2to4_permuted")
    assert "command       widekernel sparsify SOURCE --recipe resnet18_in1k_224_2to4_permuted\n" in text
    assert '  method: "permuted" (default: "magnitude")\n' in text
    details = json.loads(said(capsys, "replknet_xl_in1k_320_eval", "--json"))
    assert details["deviations"]["from_defaults"]["data.mean"] == {"value": [0.5, 0.5, 0.5], "default": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slak_tiny_in1k_300e"], "Did you mean 'slak_tiny_in1k_300e_224'?"),
        (["slakk*"], "No recipe is left with name 'slakk*'."),
        (["--family", "slk"], "Did you mean 'slak'? They have convnext, demo, detection,"),
        (["--task", "detektion"], "Did you mean 'detection'? They have classification, detection, segmentation."),
        (["--family", "roadmap", "--verified"], "None of these recipes was run with this library"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments)
