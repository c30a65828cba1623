"""Context of a run: everything that it needs besides its model, data and settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from widekernel.engine.processes import Processes
from widekernel.engine.reporter import Reporter, SilentReporter
from widekernel.engine.run_folder import RunFolder


@dataclass(frozen=True)
class RunContext:
    """Context of a run: where it is stored, computes and reports, and what identifies it.

    Args:
        folder: folder that stores the run
        device: device of the model
        processes: the processes that train together
        reporter: receives progress and messages
        fingerprint: description of the training data; a resumed run must have the same data
        code: description of the program; the user is told if a run is resumed by a different one
        description: description of the model, stored in training states so that they can be used without this run
        settings: settings of the run, stored in training states so that states of other runs are recognized
    """

    folder: RunFolder
    device: torch.device
    processes: Processes = field(default_factory=Processes)
    reporter: Reporter = field(default_factory=SilentReporter)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
