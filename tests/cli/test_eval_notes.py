"""Notes of an evaluation on the data, and on its assumptions about the weights."""

import pytest
import torch
from PIL import Image

from widekernel.cli.evaluation import evaluate_on
from widekernel.cli.options import EvalOptions
from widekernel.data import DataConfig, Preprocessing
from widekernel.tasks.saved import SavedModel


@pytest.mark.parametrize("names", [(), ("0", "1", "10", "2")])
def test_notes_of_an_evaluation(tmp_path, capsys, names):
    for name, shade in (("0", 0), ("1", 60), ("2", 120), ("10", 180)):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / "val" / name / "x.png")
        (tmp_path / "val" / name / "x.xml").write_text("x")

    class Reads(torch.nn.Module):
        """Network whose largest output has the index brightness / 60."""

        def forward(self, images):
            return torch.nn.functional.one_hot((images[:, 0, 4, 4] * 255 / 60).round().long(), 4).float()

    preprocessing = Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest", 1.0)
    saved = SavedModel("a_model", {}, "training", 4, names, preprocessing)
    data = DataConfig(root=str(tmp_path), workers=0)
    result = evaluate_on(Reads(), saved, data, EvalOptions(device="cpu"))
    told = " ".join(capsys.readouterr().err.split())
    assert "4 file(s) left out" in told and "4 .xml" in told
    assert ("matched to its outputs by number" in told) == (names == ())
    assert result.top1 == (100 if names == () else 50)
