"""The folder of one run: configuration, metrics, training states, curves and the final model."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from widekernel.errors import WidekernelError
from widekernel.files import explained, write_atomically
from widekernel.training.locks import exclusive

LIVE_KEYS = frozenset(
    {
        "output",
        "data.root",
        "data.download",
        "data.workers",
        "data.max_unreadable",
        "loop.device",
        "loop.log_every",
        "loop.eval_batch_size",
        "checkpoint.every_epochs",
        "checkpoint.every_steps",
        "checkpoint.keep",
    }
)
"""Settings that a resumed run may change: they do not alter what is computed."""


class RunFolderError(WidekernelError, ValueError):
    """A run folder that cannot be written, or belongs to another run."""


class RunFolder:
    """Paths and small files of a run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.curves = self.path / "curves.png"
        self.model = self.path / "model.safetensors"
        self.model_ema = self.path / "model_ema.safetensors"
        self.summary = self.path / "summary.json"
        self.masks = self.path / "masks.safetensors"
        self.sparsity = self.path / "sparsity.json"
        self.sparsity_picture = self.path / "sparsity.png"
        self.lock = self.path / ".lock"

    def prepare(self, config: dict[str, Any]) -> None:
        """Create the folder for ``config``, or check that it already belongs to it.

        Raises:
            RunFolderError: the folder is not writable, holds a run with another configuration (the message names
                the keys), or holds something else.
        """
        self.make_writable()
        if self.config.exists():
            self._check_same(config)
        elif self.checkpoints.exists() or self.metrics.exists():
            raise RunFolderError(
                f"{self.path} holds a run without its config.yaml, so it cannot be resumed. Choose another --output."
            )
        else:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            with explained(self.config):
                write_atomically(self.config, lambda file: file.write(text.encode()))

    def make_writable(self) -> None:
        """Create the folder and write a file to it.

        Raises:
            RunFolderError: that is not possible.
        """
        probe = self.path / f".probe.tmp.{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise RunFolderError(
                f"The output folder {str(self.path)!r} cannot be written: {error.strerror or error}. "
                "Choose another --output."
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder during the block.

        Raises:
            RunFolderError: one already does, or the folder's file system has no locks.
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
            yield

    def _check_same(self, config: dict[str, Any]) -> None:
        saved, new = flatten(self.read_config()), flatten(config)
        if new.get("sparsity.method") == "none":
            saved.setdefault("sparsity.method", "none")  # which runs of version 0.1 do not state
        differing = sorted(
            key for key in saved.keys() | new.keys() if key not in LIVE_KEYS and saved.get(key) != new.get(key)
        )
        if differing:
            lines = [f"  {key}: {saved.get(key)!r} there, {new.get(key)!r} now" for key in differing]
            raise RunFolderError(
                f"{self.path} holds a run with a different configuration:\n"
                + "\n".join(lines)
                + "\nResume with the same settings, or choose another --output."
            )

    def read_config(self) -> dict[str, Any]:
        """The saved configuration.

        Raises:
            RunFolderError: there is none, or it is damaged.
        """
        try:
            config = yaml.safe_load(self.config.read_text())
        except FileNotFoundError as error:
            raise RunFolderError(f"{self.path} is no run folder: it has no config.yaml.") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunFolderError(f"{self.config} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise RunFolderError(f"{self.config} is damaged: it holds no settings.")
        return config

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the final result; its presence marks the run as finished.

        Raises:
            WidekernelError: it cannot be written.
        """
        with explained(self.summary):
            write_atomically(self.summary, lambda file: file.write((json.dumps(summary, indent=2) + "\n").encode()))

    def read_summary(self, required: Iterable[str] = ()) -> dict[str, Any] | None:
        """The final result, or ``None`` while the run is unfinished.

        Raises:
            RunFolderError: the file is damaged, or lacks one of the ``required`` figures.
        """
        try:
            summary = json.loads(self.summary.read_text())
            missing = [key for key in required if key not in summary] if isinstance(summary, dict) else ["a mapping"]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.summary} is damaged ({error}). Delete it, and the run finishes again.") from error
        return summary


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; an empty mapping is a value of its own."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
