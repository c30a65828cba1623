"""Registered networks: their names, their functions in the family's module, and their entries in timm's registry."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import timm

import widekernel.models
from widekernel.models import list_models
from widekernel.weights import list_checkpoints

NAMES = {
    "isotropic": [f"convnext_isotropic_{size}" for size in ("small", "base", "large", "nano")],
    "replknet": [f"replknet_{size}" for size in ("31b", "31l", "xl", "nano")],
    "roadmap": [
        "roadmap_00_resnet50",
        "roadmap_01_stage_ratio",
        "roadmap_02_patchify",
        "roadmap_03_depthwise",
        "roadmap_04_width",
        "roadmap_05_inverted",
        "roadmap_06_dw_first",
        "roadmap_07_kernel7",
        "roadmap_08_gelu",
        "roadmap_09_fewer_acts",
        "roadmap_10_fewer_norms",
        "roadmap_11_layernorm",
        "roadmap_12_final_norm",
        "roadmap_13_convnext_t",
        "roadmap_nano",
    ],
    "shiftwise": [f"{kind}_{size}" for kind in ("shiftwise", "shiftwise_v1") for size in ("tiny", "small", "base", "nano")],
    "slak": [
        f"{kind}_{size}"
        for kind in ("slak", "slak_reg", "slak_pw", "slak_pww")
        for size in ("tiny", "small", "base", "large", "nano")
    ],
    "unireplknet": [f"unireplknet_{size}" for size in ("a", "f", "p", "n", "t", "s", "b", "l", "xl", "nano")],
}
ALL = sorted(name for names in NAMES.values() for name in names)
FOLDER = Path(widekernel.models.__file__).parent


def functions(module: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((FOLDER / f"{module}.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_registered_names() -> None:
    assert len(ALL) == len(set(ALL))
    assert sorted(list_models()) == ALL
    assert all(timm.is_model(name) for name in ALL)
    with_weights = {each.model for each in list_checkpoints(task="classification")}
    assert {name for name in ALL if timm.is_model_pretrained(name)} == with_weights & set(ALL)
    assert list_models("slak_*nano") == ["slak_nano", "slak_pw_nano", "slak_pww_nano", "slak_reg_nano"]


def test_the_documentation_counts_them() -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert f"registers {len(ALL)} networks with timm" in page.read_text()


@pytest.mark.parametrize("module", NAMES)
def test_names_by_module(module: str) -> None:
    assert sorted(timm.list_models(module=module)) == sorted(NAMES[module])


@pytest.mark.parametrize("module", NAMES)
def test_every_network_is_a_function_that_can_be_searched_for(module: str) -> None:
    defined = functions(module)
    for name in NAMES[module]:
        function = defined[name]
        assert [ast.unparse(decorator) for decorator in function.decorator_list] == ["register_model"]
        assert len(ast.get_docstring(function) or "") > 40
        assert [arg.arg for arg in function.args.args] == ["pretrained"]
        entrypoint = timm.model_entrypoint(name)
        assert (entrypoint.__name__, entrypoint.__module__) == (name, f"widekernel.models.{module}")


@pytest.mark.parametrize("name", ALL)
def test_functions_create_the_network_of_their_name(name: str) -> None:
    """The name that is passed on must be that of the function: timm looks up the preprocessing by it."""
    module = next(module for module, names in NAMES.items() if name in names)
    texts = [node.value for node in ast.walk(functions(module)[name]) if isinstance(node, ast.Constant)]
    assert name in texts
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    assert cfg.architecture == name
    assert (cfg.tag == "untrained") == (not timm.is_model_pretrained(name))
    assert timm.get_pretrained_cfg(f"{name}.untrained").tag == "untrained"
