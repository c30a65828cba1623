"""Section on settings and versions: those of the run, and those of this machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch

import widekernel
from widekernel.bench.machine import cpu_model, installed_version
from widekernel.data.config import processors
from widekernel.ops.cpu import library
from widekernel.report.parts import Missing
from widekernel.report.subject import Subject
from widekernel.settings import flatten
from widekernel.tasks.classification.config import TrainConfig


@dataclass(frozen=True)
class Setting:
    """A setting of the run.

    Attributes:
        key: its dotted name.
        value: its value as text.
        default: the default value as text; None if there is no such setting in this version.
    """

    key: str
    value: str
    default: str | None

    @property
    def is_changed(self) -> bool:
        """Whether the value is not the default."""
        return self.value != self.default


@dataclass(frozen=True)
class Circumstances:
    """Settings of the run, and versions.

    Attributes:
        settings: of the run.
        trained_with: versions with which the run was finished, by package.
        versions: versions that made this report, by package.
        machine: facts about the machine that made this report.
        made_at: when, in UTC.
    """

    settings: tuple[Setting, ...] | Missing
    trained_with: Mapping[str, str]
    versions: Mapping[str, str]
    machine: tuple[tuple[str, str], ...]
    made_at: str


def circumstances(subject: Subject) -> Circumstances:
    """Collect settings and versions."""
    code = subject.summary.get("code") or {}
    return Circumstances(
        settings=_settings(subject),
        trained_with={str(name): str(version) for name, version in code.items() if not str(name).startswith("digest")},
        versions=_versions(),
        machine=_machine(),
        made_at=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _settings(subject: Subject) -> tuple[Setting, ...] | Missing:
    if subject.run is None:
        return Missing(
            "The weights do not come from a run folder, so the settings of the training are unknown.",
            "Give the folder of a run: `widekernel report runs/NAME`.",
        )
    usual = flatten(asdict(TrainConfig()))
    found = flatten(subject.config)
    return tuple(Setting(key, _text(value), _text(usual[key]) if key in usual else None) for key, value in found.items())


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _versions() -> dict[str, str]:
    others = {name: installed_version(name) for name in ("torchvision", "timm")}
    own = widekernel.__version__
    return {"Python": platform.python_version(), "PyTorch": str(torch.__version__), "widekernel": own, **others}


def _machine() -> tuple[tuple[str, str], ...]:
    loaded = library.load()
    facts = [
        ("Processor", cpu_model()),
        ("Cores", f"{processors()}, of which PyTorch uses {torch.get_num_threads()} as threads"),
        ("Vector instructions", f"{torch.backends.cpu.get_cpu_capability()} in PyTorch"),
        ("Native library", "not loaded" if loaded.reason is not None else f"loaded, for {loaded.isa}"),
    ]
    if torch.cuda.is_available():
        facts.append(("GPU", torch.cuda.get_device_name()))
    return tuple((label, text) for label, text in facts if text)
