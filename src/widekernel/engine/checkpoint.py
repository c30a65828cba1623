"""Training states on disk: written in the background, verified when loaded, and with earlier states to fall back on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from widekernel import __version__
from widekernel.engine.background import Background
from widekernel.engine.snapshot import Snapshot, UnsavableError
from widekernel.engine.state_file import (
    FORMAT,
    FormatError,
    check_resumable,
    digest_path,
    header_of,
    is_state,
    load_state,
    read_state,
    state_name,
    step_of,
    verified_digest,
    write_state,
)
from widekernel.engine.write_policy import WritePolicy
from widekernel.errors import CheckpointError
from widekernel.files import reason_of, remove_leftovers, sha256_of

__all__ = ["FORMAT", "CheckpointStore", "StateReference", "load_state", "step_of"]

_WHAT = "the training state"
_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "Free some space or choose another --output",
    (errno.EROFS, errno.EACCES, errno.EPERM): "Make the folder writable or choose another --output",
    (errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.ENOTDIR): "Restore the folder",
}


class StateReference(NamedTuple):
    """Name and digest of a state that the main process has chosen, for the others.

    Args:
        name: name of the file in the folder of the store
        digest: its SHA-256 digest, in hexadecimal
    """

    name: str
    digest: str


class CheckpointStore:
    """Folder `checkpoints/` of a run: `step-XXXXXXXX.pt` files, each with its `.sha256`.

    A state is a plain `torch.save` file of tensors and containers, which `torch.load(..., weights_only=True)` reads.
    The digest is written first: a state file without a matching digest is never used.

    One process, the main one, saves and chooses. Data loading workers may be forked while a state is written.

    Args:
        folder: the folder, which is created at the first save, in a folder that exists
        keep: number of latest states to keep; the best one is always kept
        report: function that receives messages about files that could not be used
        policy: what happens if a state cannot be written; by default, the error is raised
        world_size: number of processes that train together, for the header of states
        settings: settings of the run, whose digest is in the header of states
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        report: Callable[[str], None] | None = None,
        *,
        policy: WritePolicy | None = None,
        world_size: int = 1,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self._report = report or (lambda text: None)
        self._policy = policy or WritePolicy()
        self._world_size = world_size
        self._settings = settings or {}
        self._snapshot = Snapshot()
        self._background = Background("writer of training states")
        self._passed_over: set[Path] = set()
        self._notes: list[str] = []  # of the background, for the foreground to report
        self._verified: dict[StateReference, tuple[int, ...]] = {}

    def paths(self) -> list[Path]:
        """Return all state files, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if is_state(path)), key=step_of)

    # -- saving ------------------------------------------------------------------------------------------------------

    def save(self, state: Mapping[str, Any], step: int, best_step: int | None) -> None:
        """Copy `state`, the state after `step` optimizer steps, and start to write the copy; the caller may go on at once.

        The previous save is awaited first. When the new state is on disk and verified, states that are no longer kept are
        removed. States that could not be read, or that are newer than `step`, are not predecessors of this one: they are
        renamed to end in `.damaged`, so that they do not count among the states to keep.

        Raises:
            UnsavableError: the state holds something other than tensors, plain values and plain containers.
            CheckpointError: the previous state could not be written, and the policy is to stop; earlier states are intact.
        """
        self.wait()
        try:
            header = header_of(step, self._world_size, __version__, self._settings)
            copy = self._snapshot.take({**state, "format": FORMAT, "header": header})
        except UnsavableError:
            raise
        except CheckpointError as error:
            self._policy.failed(_WHAT, error)
            return
        self._background.start(lambda: self._write(copy, step, best_step))

    def save_now(self, state: Mapping[str, Any], step: int, best_step: int | None) -> bool:
        """Save like `save`, and wait until the state is on disk; return whether it is."""
        self.save(state, step, best_step)
        return self._background.pending and self.wait()

    def wait(self) -> bool:
        """Wait until the last save is finished; return whether it was successful, or there was none to wait for.

        Raises:
            CheckpointError: the state could not be written, and the policy is to stop; earlier states are intact.
        """
        if not self._background.pending:
            return True
        with self._policy.attempt(_WHAT) as attempt:
            self._background.wait()
        while self._notes:
            self._report(self._notes.pop(0))
        return attempt.succeeded

    def _write(self, state: dict[str, Any], step: int, best_step: int | None) -> None:
        path = self.folder / state_name(step)
        try:
            self.folder.mkdir(exist_ok=True)
            self._set_aside(step)
            write_state(path, state)
        except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError for some errors of the file
            raise CheckpointError(
                f"The training state after step {step} cannot be written to {self.folder}: {reason_of(error)}. "
                f"{_remedy(error)}; earlier states were not touched."
            ) from error
        try:
            self._prune(path, best_step)
        except OSError as error:  # the next save tries again
            self._notes.append(f"Older training states in {self.folder} cannot be removed: {reason_of(error)}.")

    def _set_aside(self, step: int) -> None:
        for path in self.paths():
            if step_of(path) > step or path in self._passed_over:
                for file in (path, digest_path(path)):
                    if file.exists():
                        file.replace(file.with_name(f"{file.name}.damaged"))
        self._passed_over.clear()

    def _prune(self, written: Path, best_step: int | None) -> None:
        for path in self.paths()[: -self.keep]:
            if path != written and step_of(path) != best_step:
                path.unlink(missing_ok=True)
                digest_path(path).unlink(missing_ok=True)
        for digest in self.folder.glob("step-*.pt.sha256"):  # a process that is killed in between leaves them alone
            if not digest.with_suffix("").exists():
                digest.unlink(missing_ok=True)
        remove_leftovers(self.folder)

    # -- loading -----------------------------------------------------------------------------------------------------

    def choose(self, resume: bool = False) -> StateReference | None:
        """Return the newest undamaged state, for `load` in every process; return `None` if there are no states.

        Args:
            resume: whether the run is to be continued from it. Otherwise, states of earlier versions count, too.

        Raises:
            FormatError: the newest undamaged state was saved by an earlier version, and the run is to be continued.
            CheckpointError: there are states, but all of them are damaged.
        """
        self.wait()
        reasons = []
        self._passed_over.clear()
        for path in reversed(self.paths()):
            try:
                reference = StateReference(path.name, verified_digest(path))
                state = read_state(path, mapped=True)
                if resume:
                    check_resumable(path, state)
            except FormatError:
                raise
            except CheckpointError as error:
                reasons.append(str(error))
                self._passed_over.add(path)
                self._report(f"Skipped a training state: {error}")
            else:
                self._verified = {reference: _identity(path)}
                return reference
        if reasons:
            raise CheckpointError(
                f"None of the {len(reasons)} training states in {self.folder} can be used: {'; '.join(reasons)} "
                "To start again, remove the run folder or choose another --output."
            )
        return None

    def load(self, reference: StateReference | tuple[str, str]) -> dict[str, Any]:
        """Load the state that the main process has chosen, if it is the same file here.

        Raises:
            CheckpointError: this process does not see the file, or sees another one.
        """
        reference = StateReference(*reference)
        path = self.folder / reference.name
        try:
            seen = self._verified.get(reference) == _identity(path) or sha256_of(path) == reference.digest
        except OSError as error:
            raise CheckpointError(
                f"The training state that the main process has chosen cannot be read here: {path}: {reason_of(error)}. "
                "The run folder must be on a file system that all processes see."
            ) from error
        if not seen:
            raise CheckpointError(
                f"{path} is not the training state that the main process has chosen: it has another SHA-256 digest here. "
                "The run folder must be on a file system that all processes see."
            )
        return read_state(path)

    def load_latest(self, resume: bool = False) -> dict[str, Any] | None:
        """Load the state that `choose` returns, or return `None` if there are no states.

        Raises:
            FormatError: it was saved by an earlier version, and the run is to be continued.
            CheckpointError: there are states, but all of them are damaged.
        """
        reference = self.choose(resume)
        return None if reference is None else self.load(reference)

    def load_step(self, step: int) -> dict[str, Any]:
        """Load the state after `step` optimizer steps.

        Raises:
            CheckpointError: it cannot be read.
        """
        self.wait()
        return load_state(self.folder / state_name(step))


def _identity(path: Path) -> tuple[int, ...]:
    """Return what changes if a file is replaced or written to."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _remedy(error: BaseException) -> str:
    number = getattr(error if isinstance(error, OSError) else error.__context__, "errno", None)
    return next((remedy for numbers, remedy in _REMEDIES.items() if number in numbers), "Check the disk")
