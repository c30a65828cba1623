"""Logger for Weights & Biases."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from widekernel.engine.logger import Logger, numbers_of
from widekernel.engine.logging_config import LoggingConfig
from widekernel.errors import ConfigError
from widekernel.files import write_file

if TYPE_CHECKING:
    from wandb import Run

_PATIENCE = 30
"""Seconds to wait for the service when a run begins or ends."""


class WandbLogger(Logger):
    """Logger that sends the rows to Weights & Biases, or stores them for `wandb sync`.

    The file wandb.json in the run folder holds the identifier, so that a resumed run continues the same curves. Rows that
    were logged before and come again are not sent twice, because steps must not go back.

    Args:
        config: settings of the logs, with a project
        folder: run folder
        settings: settings of the run, which are shown as its configuration
        message: shows where the run can be seen
    """

    name = "Weights & Biases"

    def __init__(
        self,
        config: LoggingConfig,
        folder: Path,
        settings: Mapping[str, Any],
        message: Callable[[str], object] | None = None,
    ) -> None:
        self.config, self.folder, self.settings, self._message = config, folder, settings, message
        self._run: Run | None = None
        self._logged = 0

    @override
    def resume(self, kept: int, logged: int) -> None:
        if self._run is not None:
            return  # the run returns to an earlier state, but steps of Weights & Biases cannot
        import wandb

        online = self.config.wandb_mode == "online"
        identifier, self._logged = self._identity(kept, logged)
        self._run = wandb.init(
            project=self.config.wandb_project,
            id=identifier,
            name=self.folder.resolve().name,
            dir=str(self.folder),
            config=dict(self.settings),
            allow_val_change=True,  # a resumed run may change some settings
            mode=self.config.wandb_mode,
            resume="allow" if online else None,
            reinit="create_new",  # a run that the calling program has open is not ours
            settings=wandb.Settings(
                silent=True, console="off", save_code=False, init_timeout=_PATIENCE, finish_timeout=_PATIENCE
            ),
        )
        if online and self._message is not None and self._run.url:
            self._message(f"Weights & Biases: {self._run.url}")

    @override
    def row(self, step: int, row: Mapping[str, Any]) -> None:
        if self._run is not None and step > self._logged:
            self._run.log(numbers_of(row), step=step)
            self._logged = step

    @override
    def flush(self) -> None: ...  # a process of its own takes each row at once, and outlives this one

    @override
    def close(self, finished: bool) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=0 if finished else 1)

    def _identity(self, kept: int, logged: int) -> tuple[str, int]:
        """Return the identifier of the run, and the last step that Weights & Biases has of it."""
        path, project = self.folder / "wandb.json", self.config.wandb_project
        if logged and path.exists():
            known = json.loads(path.read_text())
            if known["project"] == project:
                return known["id"], logged
        identifier = secrets.token_hex(4)
        write_file(path, json.dumps({"project": project, "id": identifier}).encode())
        return identifier, kept


def require_account() -> None:
    """Raise a `ConfigError` if there is no key of an account, for which Weights & Biases would ask at the console."""
    import wandb

    if wandb.run is None and not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "logging.wandb_mode is 'online', but Weights & Biases has no API key: run `wandb login`, set WANDB_API_KEY, or "
            "use --logging.wandb_mode offline."
        )
