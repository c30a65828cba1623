"""Network that the user names: a run folder, a model file or a checkpoint, and which of its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from widekernel.engine.run_folder import RunFolder

Weights = Literal["model", "ema"]


@dataclass(frozen=True)
class ModelSource:
    """Network to load.

    Args:
        path: run folder, or checkpoint file with a model or a training state of a run
        weights: the weights themselves, or their moving average
        state: which weights of a run folder: the last ones, or those with the best evaluation
        model: model name, for a checkpoint file that does not describe itself
        model_args: arguments of that model
        num_classes: outputs of that model; `None` keeps its own number
    """

    path: Path
    weights: Weights = "model"
    state: Literal["last", "best"] = "last"
    model: str | None = None
    model_args: dict[str, Any] | None = None
    num_classes: int | None = None

    def weights_path(self) -> Path:
        """Return the path of the weights, beside which what is made of them is written."""
        return self.path / "model" if self.path.is_dir() else self.path

    def run_folder(self) -> RunFolder | None:
        """Return the run whose folder is `path` or contains it, or `None`."""
        for candidate in (self.path, self.path.parent):
            if (candidate / "config.yaml").is_file():
                return RunFolder(candidate)
        return None
