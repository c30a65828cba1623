"""What the README and CONTRIBUTING show runs as they show it, and links point to files that exist."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch

import widekernel

ROOT = Path(__file__).resolve().parent.parent
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES = 130
# Smaller networks and images for the same calls.
STAND_INS = {"convnext_tiny": "test_convnext", "slak_tiny": "slak_nano", "224": "64"}
NUMBER = re.compile(r"\d[\d.,]*")


def python_blocks(page: Path) -> list[str]:
    """Return the blocks of Python code of a page, in order, without their indentation."""
    found = re.findall(r"^ *```python\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


def shown(block: str) -> str:
    """Return the output that a block shows: its lines that are nothing but a comment."""
    return " ".join(line.removeprefix("# ") for line in block.splitlines() if line.startswith("# "))


def pattern(output: str, numbers: bool) -> str:
    """Turn an output that was shown into a regular expression: "…" stands for anything, and so do spaces between words.

    Args:
        output: as shown.
        numbers: whether numbers must be as shown.
    """
    words = [re.escape(word).replace("…", ".*") for word in output.split()]
    joined = r"\s*".join(words)
    return joined if numbers else re.sub(r"threads?\b", "threads?", NUMBER.sub(r"\\d[\\d.,]*", joined.replace(r"\.", ".")))


def run_readme(replacements: Mapping[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run the blocks of the README in one namespace, and hold what they print against what it shows."""
    checkpoint = timm.create_model(replacements.get("slak_tiny", "slak_tiny"))
    widekernel.save_checkpoint(checkpoint, "SLaK_tiny_checkpoint.pth", layout="official")
    batches = [(torch.randn(2, 3, 64, 64), torch.randint(10, (2,))) for _ in range(2)]
    namespace = {"loader": batches}
    for block in python_blocks(README):
        code = block
        for old, new in replacements.items():
            code = code.replace(old, new)
        exec(compile(code, str(README), "exec"), namespace)
        exact = code == block and "accelerate" not in block  # times, and what they decide, are those of a machine
        printed = " ".join(capsys.readouterr().out.split())
        assert shown(block), "each block shows what it prints"
        assert re.fullmatch(pattern(shown(code), numbers=exact), printed), printed


def test_the_readme_runs_with_small_networks(tmp_path, monkeypatch, capsys) -> None:
    text = "\n".join(python_blocks(README))
    assert all(old in text for old in STAND_INS)
    monkeypatch.chdir(tmp_path)
    run_readme(STAND_INS, capsys)


@pytest.mark.slow
def test_the_readme_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run_readme({}, capsys)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES
    assert not re.search(r"^# @\w+@$", README.read_text(), re.MULTILINE)


# ---- The toy network of CONTRIBUTING

TRY_TOYNET = """
import importlib.util, sys
import timm, torch, widekernel
from widekernel.layers import FoldedLargeKernel
from widekernel.models.layouts.registry import identify

for name in ("toynet", "toynet_layouts"):
    spec = importlib.util.spec_from_file_location(f"widekernel.models.{name}", f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

torch.manual_seed(0)
model, other = timm.create_model("toynet_nano").eval(), timm.create_model("toynet_nano").eval()
path = widekernel.save_checkpoint(model, "a.pth", layout="official")
report = widekernel.load_checkpoint(other, path)
assert report.layout == "ToyNet" and not (report.missing or report.ignored or report.dropped), report
assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
assert identify(torch.load(path)["model"]).name == "ToyNet"
assert identify(model.state_dict()).name == "widekernel's ToyNet"
assert identify(timm.create_model("slak_nano").state_dict()).name == "widekernel's SLaK"

x = torch.randn(2, 3, 64, 64)
folded = widekernel.fold(model)
assert any(isinstance(module, FoldedLargeKernel) for module in folded.modules())
torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
dilated = timm.create_model("toynet_nano", output_stride=16).eval()
dilated.load_state_dict(model.state_dict())
fine, coarse = dilated.forward_features(x), model.forward_features(x)
torch.testing.assert_close(fine[:, :, ::2, ::2], coarse, rtol=1e-4, atol=1e-4)
"""


def test_the_toy_network_of_contributing_works(tmp_path: Path) -> None:
    """In a process of its own: timm keeps what is registered."""
    network, layout = python_blocks(CONTRIBUTING)
    (tmp_path / "toynet.py").write_text(network)
    (tmp_path / "toynet_layouts.py").write_text(layout)
    done = subprocess.run([sys.executable, "-c", TRY_TOYNET], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- Links and paths


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    broken = []
    for link in links:
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert broken == []


def test_there_are_links() -> None:
    """Otherwise the test above would hold trivially."""
    assert len(re.findall(r"\]\(docs/", README.read_text())) > 10


@pytest.mark.parametrize("page", [README, CONTRIBUTING, ROOT / "docs" / "architecture.md"], ids=lambda page: page.name)
def test_named_paths_exist(page: Path) -> None:
    """Paths in backticks, from the root of the repository or of the package."""
    top = {path.name for path in (*ROOT.iterdir(), *(ROOT / "src" / "widekernel").iterdir()) if path.is_dir()}
    named = [path for path in re.findall(r"`(\w+/[\w./]*)`", page.read_text()) if path.split("/")[0] in top]
    lost = [p for p in named if not any((base / p).exists() for base in (ROOT, ROOT / "src" / "widekernel"))]
    assert [path for path in lost if "toynet" not in path] == []
    assert named or page == README
