"""Names, settings and states of version 0.4, which still work."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.sparsity.nets import controlled, masks_of, quick, same, small_net, train_step
from widekernel.engine.config import SparsityConfig
from widekernel.errors import ArgumentError
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig, SparsityReport, semi_structured
from widekernel.tasks.sparsify.config import SparsifyConfig

MOVED = semi_structured._MOVED


def test_the_old_name_of_semi_structured_in_settings() -> None:
    with pytest.warns(FutureWarning, match=r"block '2:4' is now called 'semi_structured'") as warned:
        config = DynamicSparsityConfig(sparsity=0.5, block="2:4")
    assert config == DynamicSparsityConfig(sparsity=0.5, block="semi_structured")
    assert warned[0].filename == __file__
    with pytest.warns(FutureWarning, match=r"sparsity\.method '2:4' is now called 'semi_structured'"):
        assert SparsityConfig("2:4") == SparsityConfig("semi_structured")
    with pytest.warns(FutureWarning, match=r"block '2:4' is now called 'semi_structured'"):
        assert SparsifyConfig(block="2:4") == SparsifyConfig()
    with pytest.raises(ArgumentError, match="unknown"):
        DynamicSparsityConfig(block="2:5")


def test_states_of_version_0_4_load() -> None:
    settings = {"block": "semi_structured", "init": "magnitude"}
    model, optimizer, controller = controlled(quick(**settings))
    train_step(model, optimizer, 0)
    state = controller.state_dict()
    assert state["config"]["block"] == "semi_structured"
    old = {**state, "config": {**state["config"], "block": "2:4"}}
    again = controlled(quick(**settings), seed=1)[2]
    again.load_state_dict(old)
    assert same(masks_of(again), masks_of(controller)) and again.step == 1


@pytest.mark.parametrize("name", MOVED)
def test_names_that_have_moved(name: str) -> None:
    module, _, new = MOVED[name].partition(":")
    with pytest.warns(FutureWarning, match=f"semi_structured.{name} "):
        value = getattr(semi_structured, name)
    assert value is getattr(importlib.import_module(module), new or name)
    assert name not in semi_structured.__all__


def test_renamed_attributes() -> None:
    _, _, controller = controlled(quick())
    with pytest.warns(FutureWarning, match="choices is now called selection"):
        assert controller.choices == controller.selection
    with pytest.warns(FutureWarning, match="moved is now called grown"):
        assert controller.moved == controller.grown
    with pytest.warns(FutureWarning, match="LayerSparsity.moved is now called grown"):
        assert [layer.moved for layer in controller.snapshot().layers] == [
            layer.grown for layer in controller.snapshot().layers
        ]
    with pytest.warns(FutureWarning, match="check_timed is now called check_total_steps"):
        quick().check_timed()
    prepared = semi_structured.prepare(torch.nn.Linear(16, 16))
    with pytest.warns(FutureWarning, match="regularisation is now called regularization"):
        assert prepared.regularisation() == 0


def test_reports_made_of_a_controller() -> None:
    model = small_net().train()
    controller = DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.1), quick())
    expected = SparsityReport(controller.snapshot())
    with pytest.warns(FutureWarning, match=r"SparsityReport\(controller\.snapshot\(\)\)"):
        report = SparsityReport.of(model, controller.selection, controller.masks, controller)
    assert report.to_dict() == expected.to_dict()
    with pytest.warns(FutureWarning, match="will be removed"):
        zeros = SparsityReport.of(model, controller.selection, {})
    assert zeros.sparsity() == pytest.approx(0.5, abs=1e-3) and not zeros.snapshot.pending
