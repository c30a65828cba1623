"""The page on segmentation and detection: its lines parse, and its figures are those of the recipes and the networks."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.command_lines import check_line

from widekernel.cli.train import parse_config
from widekernel.recipes import list_recipes, load_recipe, recipe_of_checkpoint
from widekernel.tasks.networks import build_detector, build_segmenter
from widekernel.weights import list_checkpoints

PAGE = Path(__file__).resolve().parents[2] / "docs" / "downstream.md"
TEXT = PAGE.read_text(encoding="utf-8")
DENSE = [name for name in list_recipes() if load_recipe(name).task != "classification"]


def our_lines() -> list[str]:
    """Return the calls of the command in blocks and in spans of code, without comments."""
    blocks = [line.strip().partition("  #")[0] for line in TEXT.splitlines() if line.startswith("    widekernel ")]
    spans = [span for span in re.findall(r"`([^`\n]+)`", TEXT) if span.startswith("widekernel ") and "." in span]
    return list(dict.fromkeys([*blocks, *spans]))


def table_rows() -> dict[str, list[str]]:
    """Return the cells of the rows about sizes, by the name of their recipe."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows if len(row) == 6}


@pytest.mark.parametrize("line", our_lines())
def test_our_lines_parse(line: str) -> None:
    check_line(line)


def test_every_recipe_is_in_a_table() -> None:
    assert sorted(table_rows()) == sorted(DENSE)


@pytest.mark.parametrize("name", DENSE)
def test_results(name: str) -> None:
    published = (load_recipe(name).published or {}).values()
    assert table_rows()[name][0] == (" / ".join(map(str, published)) or "–")


def test_every_published_network_has_a_recipe() -> None:
    assert all(each.task == "classification" or recipe_of_checkpoint(each.name) for each in list_checkpoints())


def test_sizes(shared: Path) -> None:
    """Figures of the page are those with which the networks are compared elsewhere."""
    from tests.recipes.published_detection import DETECTION
    from tests.recipes.published_segmentation import SEGMENTATION

    rows = json.loads((shared / "parity" / "downstream" / "golden" / "params_flops.json").read_text())["rows"]
    sizes: dict[str, dict[str, Any]] = {row["name"]: row for row in rows}
    for name, run in {**SEGMENTATION, **DETECTION}.items():
        if run.size is None:
            continue
        row, (_, parameters, published, macs, published_macs) = sizes[run.size], table_rows()[name]
        total, without = row["params"] / 1e6, row["params_without_aux"] / 1e6
        assert parameters == (f"{total:.1f}" if without == total else f"{total:.1f} ({without:.1f})"), name
        assert macs == f"{row['macs_G']:.1f}", name
        if run.published is not None:
            stated = row["published_params_M"], row["published_G"]
            assert (published, published_macs) == tuple("–" if each is None else str(each) for each in stated), name


@pytest.mark.slow
def test_sizes_of_shift_wise_networks() -> None:
    """There are no reference numbers for them; the authors publish 62.51 M and 953.81 G for segmentation."""
    from widekernel.analysis.complexity import complexity

    for name, size in (
        ("shiftwise_tiny_ade20k_160k_512", (512, 2048)),
        ("shiftwise_tiny_coco_36e_800_cascade", (800, 1280)),
    ):
        config: Any = parse_config(["--recipe", name])
        with torch.device("meta"):
            network = build_segmenter(config.model, 150) if "ade20k" in name else build_detector(config.model, 80, True)
        counted = complexity(network, (3, *size)).training
        assert counted.macs is not None
        row = table_rows()[name]
        assert (row[1].split()[0], row[3]) == (f"{counted.params / 1e6:.1f}", f"{counted.macs / 1e9:.1f}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DENSE if name.startswith("unireplknet_")])
def test_sizes_of_unireplknet(name: str) -> None:
    """Counted in the folded form: within 1 of the published parameters without the auxiliary head, and of the operations."""
    from widekernel.analysis.complexity import complexity

    config: Any = parse_config(["--recipe", name])
    size = (800, 1280) if "coco" in name else (640, 2560) if "640" in name else (512, 2048)
    with torch.device("meta"):
        network = build_segmenter(config.model, 150) if "ade20k" in name else build_detector(config.model, 80, True)
    counted = complexity(network, (3, *size)).folded
    total, without = (each / 1e6 for each in (counted.params, counted.params - _in_auxiliary_head(network)))
    _, parameters, published, macs, published_macs = table_rows()[name]
    assert parameters == (f"{total:.1f}" if without == total else f"{total:.1f} ({without:.1f})")
    assert macs == f"{counted.macs / 1e9:.1f}"
    assert abs(without - float(published)) < 1 and abs(counted.macs / 1e9 - float(published_macs)) < 1


def _in_auxiliary_head(network: Any) -> int:
    return sum(parameter.numel() for key, parameter in network.named_parameters() if key.startswith("auxiliary_head."))


def lines_with_a_task() -> list[str]:
    return [line for line in our_lines() if line.startswith("widekernel train --task")]


@pytest.mark.parametrize("line", lines_with_a_task())
def test_other_backbones_are_built(line: str) -> None:
    config: Any = parse_config(shlex.split(line)[2:])
    with torch.device("meta"):
        if config.task == "segmentation":
            network: Any = build_segmenter(config.model, 4)
        else:
            network = build_detector(config.model, 4, config.data.masks)
    assert list(network.backbone.strides)[-3:] == [8, 16, 32]


def test_lines_of_python_run() -> None:
    """The network of the example is that of the weights in it; their files are not fetched here."""
    from widekernel.recipes.networks import build_published

    names = re.findall(r"build_published\(\"(.*?)\"\)", TEXT)
    assert names and len(lines_with_a_task()) >= 3
    for name in names:
        with torch.device("meta"):
            assert build_published(name).training
