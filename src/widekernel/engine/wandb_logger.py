"""Logger for Weights & Biases."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
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

    The file wandb.json in the run folder holds the identifier, so that a resumed run continues the same curves. If the
    service lacks rows, because the process was killed before it sent them, they are sent again; those that it has are not,
    because steps must not go back. Offline, nobody knows what was lost. Therefore, each process writes the whole run, and
    the folders of earlier ones are renamed, so that `wandb sync` finds one.

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
        self._next = 0

    @override
    def resume(self, rows: Sequence[Mapping[str, Any]], logged: int) -> None:
        if self._run is not None:
            return  # the run returns to an earlier state, but steps of Weights & Biases cannot
        import wandb

        online = self.config.wandb_mode == "online"
        identifier = self._identifier(is_new=not logged)
        if not online:
            for earlier in (self.folder / "wandb").glob(f"offline-run-*-{identifier}"):
                earlier.rename(earlier.with_name(f"superseded-{earlier.name}"))
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
        self._next = self._run.step  # after those that the service has
        for row in rows:
            self.row(row["step"], row)
        if online and self._message is not None and self._run.url:
            self._message(f"Weights & Biases: {self._run.url}")

    @override
    def row(self, step: int, row: Mapping[str, Any]) -> None:
        if self._run is not None and step >= self._next:
            self._run.log(numbers_of(row), step=step)
            self._next = step + 1

    @override
    def flush(self) -> None: ...  # rows that are lost come again

    @override
    def close(self, finished: bool) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=0 if finished else 1)

    def _identifier(self, is_new: bool) -> str:
        """Return the identifier of the run, which a file remembers if the run is not new."""
        path, project = self.folder / "wandb.json", self.config.wandb_project
        if not is_new and path.exists():
            known = json.loads(path.read_text())
            if known["project"] == project:
                return known["id"]
        identifier = secrets.token_hex(4)
        write_file(path, json.dumps({"project": project, "id": identifier}).encode())
        return identifier


def require_account() -> None:
    """Raise a `ConfigError` if there is no key of an account, for which Weights & Biases would ask at the console."""
    import wandb

    if wandb.run is None and not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "logging.wandb_mode is 'online', but Weights & Biases has no API key: run `wandb login`, set WANDB_API_KEY, or "
            "use --logging.wandb_mode offline."
        )
