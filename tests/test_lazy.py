"""Packages whose names are imported when they are first used."""

from __future__ import annotations

import importlib
import importlib.util
import json
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


IMPORTS = """
import json, sys
sys.argv = ["-m", "a"]
import torch, widekernel.ops
from torch.utils.flop_counter import flop_registry
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("widekernel::")]
found = {"operators": len(names)}
found["counted"] = sum(getattr(torch.ops.widekernel, name[12:]) in flop_registry for name in names)
found["analysis"] = "widekernel.analysis" in sys.modules
import timm
found["registered"] = timm.is_model("slak_nano")
import widekernel.data, widekernel.engine
found["heavy"] = sorted({"matplotlib", "sklearn", "rich", "jsonargparse"} & set(sys.modules))
print(json.dumps(found))
"""


def test_what_importing_the_package_brings() -> None:
    """Networks are registered, also in programs that run as `python -m`; operators have counts; imports stay cheap."""
    done = subprocess.run([sys.executable, "-c", IMPORTS, "-m", "widekernel"], capture_output=True, text=True, check=True)
    wanted = {"operators": 6, "counted": 6, "analysis": False, "registered": True, "heavy": []}
    assert json.loads(done.stdout) == wanted


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
