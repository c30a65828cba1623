"""Training states on disk: written atomically, verified when loaded, and with earlier states to fall back on."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from widekernel.errors import CheckpointError, in_short
from widekernel.files import reason_of, sha256_of, write_atomically

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.pt$")


class CheckpointStore:
    """Folder `checkpoints/` of a run: `step-XXXXXXXX.pt` files, each with its `.sha256`.

    A state is a plain `torch.save` file of tensors and containers, which `torch.load(..., weights_only=True)` reads.
    The digest is written first: a state file without a matching digest is never used.

    Args:
        folder: the folder, which is created at the first save
        keep: number of latest states to keep; the best one is always kept
        report: function that receives messages about files that could not be used
    """

    def __init__(self, folder: Path, keep: int = 2, report: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self._report = report or (lambda text: None)
        self._passed_over: set[Path] = set()

    def paths(self) -> list[Path]:
        """Return all state files, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.match(path.name)), key=step_of)

    def save(self, state: dict[str, Any], step: int, best_step: int | None) -> Path:
        """Write `state` as the state after `step` optimizer steps, and remove states that are no longer kept.

        States that could not be read, or that are newer than `step`, are not predecessors of this one. They are first
        renamed to end in `.damaged`, so that they do not count among the states to keep.

        Raises:
            CheckpointError: the disk is full or not writable; earlier states are untouched.
        """
        path = self.folder / f"step-{step:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._set_aside(step)
            write_atomically(
                path,
                lambda file: torch.save({"format": FORMAT, **state}, file),
                before_rename=lambda complete: _write_digest(path, sha256_of(complete)),
            )
            self._prune(path, best_step)
        except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError if the disk is full
            raise CheckpointError(
                f"The training state cannot be written to {self.folder}: {reason_of(error)}. "
                "Free some space or choose another --output; earlier states are intact."
            ) from error
        return path

    def _set_aside(self, step: int) -> None:
        for path in self.paths():
            if step_of(path) > step or path in self._passed_over:
                for file in (path, _digest_path(path)):
                    if file.exists():
                        file.replace(file.with_name(f"{file.name}.damaged"))
        self._passed_over.clear()

    def _prune(self, written: Path, best_step: int | None) -> None:
        for path in self.paths()[: -self.keep]:
            if path != written and step_of(path) != best_step:
                path.unlink(missing_ok=True)
                _digest_path(path).unlink(missing_ok=True)
        for leftover in self.folder.glob("*.tmp.*"):
            leftover.unlink(missing_ok=True)

    def load_latest(self) -> dict[str, Any] | None:
        """Load the newest undamaged state; return `None` if there are no states.

        Raises:
            CheckpointError: there are states, but all of them are damaged.
        """
        reasons = []
        self._passed_over.clear()
        for path in reversed(self.paths()):
            try:
                return load_state(path)
            except CheckpointError as error:
                reasons.append(str(error))
                self._passed_over.add(path)
                self._report(f"Skipped a training state: {error}")
        if reasons:
            raise CheckpointError(
                f"None of the {len(reasons)} training states in {self.folder} can be used: {'; '.join(reasons)} "
                "To start again, remove the run folder or choose another --output."
            )
        return None

    def load_step(self, step: int) -> dict[str, Any]:
        """Load the state after `step` optimizer steps.

        Raises:
            CheckpointError: it cannot be read.
        """
        return load_state(self.folder / f"step-{step:08d}.pt")


def load_state(path: Path) -> dict[str, Any]:
    """Load one training state after verifying its digest; nothing in the file is executed.

    Raises:
        CheckpointError: the file or its digest is missing, they do not match, or the format is unknown.
    """
    if path.exists() and not _digest_path(path).exists():
        raise CheckpointError(
            f"{path.name} cannot be verified: its digest file {_digest_path(path).name} is missing. Restore that file; or, "
            f"if you are sure that the state is intact, create it with `sha256sum {path.name} > {_digest_path(path).name}`."
        )
    try:
        expected = _digests(path)
        found = sha256_of(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} has no readable digest file ({error}).") from error
    if found not in expected:
        raise CheckpointError(f"{path.name} does not match its SHA-256 digest: it is damaged or incomplete.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for foreign files
        raise CheckpointError(f"{path.name} is not a training state ({in_short(error)}).") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path.name} is not a training state: it holds a {type(state).__name__}.")
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path.name} has format {state.get('format')!r}; this version reads format {FORMAT}.")
    return state


def step_of(path: Path) -> int:
    """Return the number of optimizer steps in the name of a state file.

    Raises:
        CheckpointError: the file is not named like a training state.
    """
    match = _NAME.match(path.name)
    if match is None:
        raise CheckpointError(f"{path.name} is not named like a training state (step-00000000.pt).")
    return int(match.group(1))


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digests(path: Path) -> list[str]:
    return [line.split()[0] for line in _digest_path(path).read_text().splitlines() if line.strip()]


def _write_digest(path: Path, digest: str) -> None:
    # If the state replaces one of the same step, the former digest is kept as well, so that either state file is accepted,
    # whichever of the two a crash leaves behind.
    former = _digests(path)[-1:] if path.exists() and _digest_path(path).exists() else []
    lines = "".join(f"{value}  {path.name}\n" for value in [*former, digest])
    write_atomically(_digest_path(path), lambda file: file.write(lines.encode()))
