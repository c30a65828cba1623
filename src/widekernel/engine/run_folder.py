"""Folder of a run: settings, metrics, training states, curves and the final model."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from widekernel.deprecation import renamed_attribute
from widekernel.engine.locks import exclusive
from widekernel.errors import CheckpointError, WidekernelError
from widekernel.files import explained, remove_leftovers, write_file
from widekernel.settings import flatten
from widekernel.sparsity.semi_structured.config import OLD_NAME, SEMI_STRUCTURED

LIVE_KEYS = frozenset(
    {
        "output",
        "data.root",
        "data.download",
        "data.workers",
        "data.timeout",
        "data.worker_restarts",
        "data.max_unreadable",
        "loop.accelerate",
        "loop.device",
        "loop.log_every",
        "loop.eval_batch_size",
        "loop.micro_batch",
        "loop.timeout",
        "evaluation.every_epochs",
        "evaluation.every_steps",
        "faults.max_skipped",
        "faults.rollbacks",
        "logging.tensorboard",
        "logging.wandb_project",
        "logging.wandb_mode",
        "checkpoint.on_failure",
        "checkpoint.max_failures",
        "checkpoint.every_epochs",
        "checkpoint.every_steps",
        "checkpoint.keep",
    }
)
"""Settings that a resumed run may change, because they do not alter what is computed (some of them, its rounding)."""

_FIRST_STATE = "step-00000000.pt"


class RunFolderError(WidekernelError, ValueError):
    """Error for a run folder that cannot be written, or belongs to another run."""


class RunFolder:
    """Paths and small files of a run.

    Args:
        path: the folder
        upgrade: function from the settings of a run, which an earlier version may have stored, to those of this version
    """

    def __init__(
        self, path: str | Path, upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda settings: settings
    ) -> None:
        self.path, self._upgrade = Path(path), upgrade
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.curves = self.path / "curves.png"
        self.model = self.path / "model.safetensors"
        self.model_ema = self.path / "model_ema.safetensors"
        self.summary = self.path / "summary.json"
        self.acceleration = self.path / "acceleration.json"
        self.masks = self.path / "masks.safetensors"
        self.sparsity = self.path / "sparsity.json"
        self.sparsity_picture = self.path / "sparsity.png"
        self.lock = self.path / ".lock"
        self._pending: dict[str, Any] | None = None

    def prepare(self, config: dict[str, Any]) -> None:
        """Check that the folder is free or belongs to a run with the settings `config`, which `begin` will write.

        Raises:
            RunFolderError: the folder is not writable, contains other files, or contains a run that has begun with other
                settings; the message names these settings.
        """
        self.make_writable()
        if self.config.exists():
            saved = self.read_config()
            if self.has_begun() or any(path.exists() for path in (self.model, self.model_ema, self.masks)):
                self._check_same(saved, config)
        else:
            own = (self.checkpoints, self.metrics, self.summary, self.model, self.model_ema, self.masks)
            found = [path.name for path in own if path.exists()]
            if found:
                raise RunFolderError(
                    f"{self.path} holds {', '.join(found)} without its config.yaml, so the run cannot be resumed. "
                    "Choose another --output."
                )
        self._pending = config

    def begin(self) -> None:
        """Write the settings that `prepare` was given; called after the first step, when the folder becomes this run's.

        Raises:
            WidekernelError: it cannot be written.
        """
        if self._pending is not None:
            for leftover in self.checkpoints.glob(f"{_FIRST_STATE}*"):  # earlier versions saved a state before any step
                leftover.unlink()
            text = yaml.safe_dump(self._pending, sort_keys=False, allow_unicode=True)
            with explained(self.config):
                # A different file does not belong to a run that has begun; it may be the user's own.
                if self.config.exists() and self.config.read_text() != text:
                    self.config.replace(self.config.with_name("config.yaml.replaced"))
            write_file(self.config, text.encode())

    def has_begun(self) -> bool:
        """Return whether there is a training state after at least one step, a row in the metrics, or a result."""
        states = (path.name for path in self.checkpoints.glob("step-*.pt*"))
        rows = self.metrics.exists() and self.metrics.stat().st_size > 0
        return rows or self.summary.exists() or any(not name.startswith(_FIRST_STATE) for name in states)

    def make_writable(self) -> list[Path]:
        """Create the folder, and check that files can be written to it.

        Returns:
            the folders that did not exist before, outermost first.

        Raises:
            RunFolderError: the folder cannot be created or written.
        """
        probe = self.path / f".probe.tmp.{os.getpid()}"
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()][::-1]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise RunFolderError(
                f"The output folder {str(self.path)!r} cannot be written: {error.strerror or error}. "
                "Choose another --output."
            ) from error
        return made

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Create and lock the folder within the block; undo this afterwards if no run has begun in it.

        Raises:
            RunFolderError: the folder cannot be written, or another process trains in it.
        """
        made = self.make_writable()
        try:
            with self.locked():
                try:
                    yield
                finally:
                    if not self.config.exists():
                        self.lock.unlink(missing_ok=True)
        finally:
            for folder in reversed(made):
                with suppress(OSError):  # a folder that is not empty stays
                    folder.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder within the block.

        Raises:
            RunFolderError: another process trains there, or the folder's file system has no locks.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(self.lock))
            except BlockingIOError as error:
                raise RunFolderError(
                    f"Another process is training in {self.path}. Wait for it, stop it, or choose another --output."
                ) from error
            except OSError as error:
                raise RunFolderError(
                    f"{self.path} cannot be locked against other processes: {error.strerror or error}. "
                    "Choose another --output."
                ) from error
            for folder in (self.path, self.checkpoints):
                with suppress(OSError):  # whether the folder can be written is checked elsewhere
                    remove_leftovers(folder)
            yield

    def _check_same(self, there: dict[str, Any], config: dict[str, Any]) -> None:
        lines = _differing(self._upgrade(there), config)
        if lines:
            raise RunFolderError(
                f"{self.path} holds a run with a different configuration:\n"
                + "\n".join(lines)
                + f"\nResume with the same settings, or choose another --output.{self.how_to_continue()}"
            )

    def check_own(self, state: dict[str, Any], config: dict[str, Any]) -> None:
        """Raise unless a training state belongs to a run with the settings `config`; old states do not record them.

        Raises:
            CheckpointError: it belongs to another run; the message names the settings that differ.
        """
        words = "in the state", "in the run"
        lines = _differing(self._upgrade(state.get("settings") or config), self._upgrade(config), words)
        if lines:
            raise CheckpointError(
                f"A training state in {self.checkpoints} belongs to a run with other settings:\n"
                + "\n".join(lines)
                + "\nRemove the states that were copied there, or choose another --output."
            )

    def check_same_data(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        """Raise unless the data are the same as those of the run.

        Args:
            then: description of the run's data; one of an earlier version may lack some keys.
            now: description of the data now.

        Raises:
            CheckpointError: the data differ; the message says how.
        """
        for key, value in now.items():
            if key in then and then[key] != value:
                raise CheckpointError(
                    f"The training data has changed: {key} was {then[key]!r} and is {value!r}. "
                    f"Restore the data, or choose another --output.{self.how_to_continue()}"
                )

    def how_to_continue(self) -> str:
        """Return a sentence that says how to start another run from the weights of this one, or "" if it has none."""
        states = sorted(self.checkpoints.glob("step-*.pt"))
        weights = self.model if self.model.exists() else states[-1] if states else None
        return "" if weights is None else f" A new run starts from the weights of this one with --model.weights {weights}"

    how_to_go_on = renamed_attribute("how_to_go_on", "how_to_continue")

    def read_config(self) -> dict[str, Any]:
        """Read the settings of the run.

        Raises:
            RunFolderError: they are missing or damaged.
        """
        try:
            config = yaml.safe_load(self.config.read_text())
        except FileNotFoundError as error:
            raise RunFolderError(f"{self.path} is not a run folder: it has no config.yaml.") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunFolderError(f"{self.config} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise RunFolderError(f"{self.config} is damaged: it holds no settings.")
        return config

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the final result, whose presence marks the run as finished.

        Raises:
            WidekernelError: it cannot be written.
        """
        write_file(self.summary, (json.dumps(summary, indent=2) + "\n").encode())

    def read_summary(self, required: Iterable[str] = ()) -> dict[str, Any] | None:
        """Read the final result; return `None` while the run is unfinished.

        Raises:
            RunFolderError: the file is damaged, or lacks one of the `required` entries.
        """
        try:
            summary = json.loads(self.summary.read_text())
            missing = [key for key in required if key not in summary] if isinstance(summary, dict) else ["a mapping"]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{self.summary} is damaged ({error}). Delete it and repeat the command, which writes it again."
            ) from error
        return summary


def _differing(there: dict[str, Any], now: dict[str, Any], words: tuple[str, str] = ("there", "now")) -> list[str]:
    """Return one line for every setting that differs, except those that do not affect what is computed."""
    saved, new = flatten(there), flatten(now)
    for settings in (saved, new):
        for key in ("sparsity.method", "sparsity.dynamic.block"):
            if settings.get(key) == OLD_NAME:  # of semi-structured sparsity, in runs of version 0.4
                settings[key] = SEMI_STRUCTURED
    if new.get("sparsity.method") == "none":
        saved.setdefault("sparsity.method", "none")  # runs of version 0.1 do not state it
    keys = sorted(key for key in saved.keys() | new.keys() if key not in LIVE_KEYS and saved.get(key) != new.get(key))
    return [f"  {key}: {saved.get(key)!r} {words[0]}, {new.get(key)!r} {words[1]}" for key in keys]
