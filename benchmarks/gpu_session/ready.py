"""Check whether this machine can measure anything: packages, GPU and compiler.

python3 -m benchmarks.gpu_session.ready FACTS.json
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

NEEDED = ("torch", "torchvision", "triton", "numpy", "timm", "jsonargparse", "rich", "yaml", "safetensors", "matplotlib")


def missing() -> list[str]:
    """Return the packages that cannot be imported, each with its reason."""
    found = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:
            found.append(f"{name} ({type(error).__name__}: {error})")
    return found


def facts() -> dict[str, Any]:
    """Return facts about the GPU and the versions in use."""
    import numpy
    import timm
    import torch
    import triton

    import widekernel

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "timm": timm.__version__,
        "widekernel": widekernel.__version__,
        "widekernel_from": str(Path(widekernel.__file__).parent),
    }


def main(arguments: list[str]) -> int:
    """Write the facts; if nothing can be measured, print the reason and return 2."""
    lacking = missing()
    if lacking:
        print(f"error: this Python lacks {'; '.join(lacking)}. `make offline-bundle` fills a folder to give as --wheels.")
        return 2
    import torch

    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        print(
            f"error: NO GPU: PyTorch {torch.__version__}, built for {build}, finds none. Nothing is measured. Run this "
            "where `nvidia-smi` lists a GPU, or rehearse with --rehearse."
        )
        return 2
    from widekernel.ops.gpu import machine

    obstacles = machine.obstacles("cuda")
    if obstacles:
        print(f"error: our kernels cannot run here: {'; '.join(obstacles)}")
        return 2
    found = facts()
    Path(arguments[0]).write_text(json.dumps(found), encoding="utf-8")
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
