"""Packages whose names are imported when they are first used."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

LAZY = (
    "widekernel",
    "widekernel.data",
    "widekernel.sparsity",
    "widekernel.sparsity.dynamic",
    "widekernel.sparsity.semi_structured",
    "widekernel.engine",
)


@pytest.mark.parametrize("package", LAZY)
def test_every_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    for name, where in module._WHERE.items():
        value = getattr(module, name)
        assert value is getattr(importlib.import_module(where), name, importlib.import_module(where))
    with pytest.raises(AttributeError, match=f"{package}' has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("package", LAZY)
def test_no_name_equals_that_of_another_submodule(package: str) -> None:
    """A submodule would replace the name as soon as it is imported."""
    module = importlib.import_module(package)
    submodules = {name for name in module._WHERE if importlib.util.find_spec(f"{package}.{name}")}
    assert {name for name in submodules if module._WHERE[name] != f"{package}.{name}"} == set()


def test_importing_the_package_registers_its_networks_wherever_it_starts() -> None:
    """This includes programs that run as `python -m`, or have such arguments themselves."""
    code = "import sys; sys.argv = ['-m', 'a']; import widekernel, timm; print(timm.is_model('slak_nano'))"
    done = subprocess.run([sys.executable, "-c", code, "-m", "widekernel"], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("widekernel.data.Share", "widekernel.data.Shard", "is now called Shard: import that from widekernel.data$"),
        ("widekernel.engine.Surroundings", "widekernel.engine.RunContext", "is now called RunContext"),
        ("widekernel.data.DataError", "widekernel.errors.DataError", "has moved: import it from widekernel.errors$"),
    ],
)
def test_an_old_name_works_and_warns(old: str, new: str, says: str) -> None:
    def value(path: str) -> object:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    with pytest.warns(FutureWarning, match=says):
        assert value(old) is value(new)
