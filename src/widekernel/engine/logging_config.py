"""Settings of the logs that a run writes besides metrics.jsonl."""

from dataclasses import dataclass
from typing import Literal

from widekernel.errors import ConfigError
from widekernel.settings import require, require_literals


@dataclass(frozen=True)
class LoggingConfig:
    """Settings of further logs; metrics.jsonl is always written. They may change when a run is resumed.

    Args:
        tensorboard: also write the metrics for TensorBoard, below the run
        wandb_project: project of Weights & Biases that also gets the metrics; null sends none
        wandb_mode: online sends the metrics at once, offline stores them below the run for
            `wandb sync`, disabled does nothing
    """

    tensorboard: bool = False
    wandb_project: str | None = None
    wandb_mode: Literal["online", "offline", "disabled"] = "online"

    def __post_init__(self) -> None:
        require_literals(self, "logging")
        ok = self.wandb_project is None or bool(self.wandb_project.strip())
        require(ok, "logging.wandb_project", self.wandb_project, "a name, or null")
        if self.wandb_project is None and self.wandb_mode == "offline":
            raise ConfigError("logging.wandb_mode is 'offline', but nothing is logged: set logging.wandb_project.")

    @property
    def uses_wandb(self) -> bool:
        """Whether Weights & Biases gets the metrics."""
        return self.wandb_project is not None and self.wandb_mode != "disabled"
