"""Shape bias: names of stimuli, decisions, counts and files."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from widekernel.analysis.shape_bias import (
    CATEGORIES,
    COLUMNS,
    Counts,
    Decision,
    Stimulus,
    decide,
    decisions_file,
    parse_name,
    read_decisions,
    shape_bias,
)
from widekernel.analysis.shape_bias_plot import plot
from widekernel.errors import ArgumentError, DataError


def test_categories_share_no_class() -> None:
    classes = [number for numbers in CATEGORIES.values() for number in numbers]
    assert len(classes) == len(set(classes))
    assert {name: len(numbers) for name, numbers in CATEGORIES.items() if len(numbers) > 8} == {"bird": 49, "dog": 109}
    assert list(CATEGORIES) == sorted(CATEGORIES)
    assert len(CATEGORIES) == 16


@pytest.mark.parametrize(
    "name", ["cat2-dog11.jpg", "0007_s5n_dnn_0_cat_00_cat2-dog11.png", "cue-conflict/cat/cat2-dog11.JPEG"]
)
def test_names(name: str) -> None:
    stimulus = parse_name(name)
    assert (stimulus.shape, stimulus.texture, stimulus.is_conflict) == ("cat", "dog", True)
    assert not parse_name("cat1-cat3.png").is_conflict


@pytest.mark.parametrize(
    ("name", "message"),
    [("tench.jpg", "airplane1-bicycle2"), ("cat1-whale2.png", "'whale'.*airplane, bear"), ("cat1-dog2", "not the name")],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_name(name)


def test_a_decision_is_the_largest_mean_probability() -> None:
    logits = torch.full((3, 1000), -10.0)
    logits[0, 404] = 5.0  # the only class of airplane
    logits[1, list(CATEGORIES["dog"])] = 4.0
    logits[1, 440] = 5.5  # the largest single output, one of seven bottles
    logits[2, 0] = 20.0  # in no category
    logits[2, 499] = 0.0
    assert decide(logits) == ["airplane", "dog", "knife"]
    with pytest.raises(ArgumentError, match=r"\(2, 10\).*1000"):
        decide(torch.zeros(2, 10))


def test_counts_and_bias() -> None:
    names = ["cat1-dog1.png", "cat2-dog1.png", "cat1-cat2.png", "dog1-cat1.png", "dog2-bird1.png"]
    responses = ["cat", "dog", "cat", "bear", "dog"]
    result = shape_bias("net", [Decision(parse_name(name), response) for name, response in zip(names, responses)])
    assert result.overall == Counts(trials=4, shape=2, texture=1)
    assert result.overall.bias == 2 / 3
    assert result.by_category == {"cat": Counts(2, 1, 1), "dog": Counts(2, 1, 0)}
    assert math.isnan(Counts(3, 0, 0).bias)
    with pytest.raises(DataError, match="net: no stimulus"):
        shape_bias("net", [Decision(parse_name("cat1-cat2.png"), "cat")])


def test_a_written_file_is_read_back(tmp_path: Path) -> None:
    decisions = [Decision(Stimulus(f"cat{i}-dog1.png", "cat", "dog"), "dog") for i in range(3)]
    path = tmp_path / "net.csv"
    path.write_bytes(decisions_file("net", decisions))
    assert path.read_text().splitlines()[:2] == [",".join(COLUMNS), "net,1,1,NaN,dog,cat,0,cat0-dog1.png"]
    assert read_decisions(path) == ("net", decisions)


@pytest.mark.parametrize(
    ("content", "message"), [("a,b\n1,2\n", "no column subj"), ("subj,object_response,imagename\n", "holds no decisions")]
)
def test_files_that_hold_no_decisions(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_decisions(path)


def test_published_observers(shared: Path) -> None:
    folder = shared / "data" / "shape_bias"
    expected = json.loads((folder / "expected.json").read_text())
    assert len(expected) == 16
    results = []
    for name, values in expected.items():
        result = shape_bias(*read_decisions(folder / name))
        counts = result.overall
        found = {"n": counts.trials, "shape": counts.shape, "texture": counts.texture, "shape_bias": round(counts.bias, 4)}
        assert found == values, name
        assert sum(one.trials for one in result.by_category.values()) == counts.trials
        results.append(result)
    assert Image.open(io.BytesIO(plot(results, [results[0].observer]))).size[0] > 1000
