"""Files of training states: how one is written and verified, and how one is read without executing anything in it."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from widekernel.engine.snapshot import UnsavableError, tensors_of
from widekernel.errors import CheckpointError, in_short
from widekernel.files import replace_atomically, sha256_of, write_atomically

FORMAT = 2
READABLE_FORMATS = (1, 2)
_NAME = re.compile(r"step-(\d{8,})\.pt$")
_LONGEST_PICKLE = 1 << 24  # bytes; the tensors are outside of it


def is_state(path: Path) -> bool:
    """Return whether a file is named like a training state."""
    return _NAME.match(path.name) is not None


def step_of(path: Path) -> int:
    """Return the number of optimizer steps in the name of a state file.

    Raises:
        CheckpointError: the file is not named like a training state.
    """
    match = _NAME.match(path.name)
    if match is None:
        raise CheckpointError(f"{path.name} is not named like a training state (step-00000000.pt).")
    return int(match.group(1))


def state_name(step: int) -> str:
    """Return the name of the file with the state after `step` optimizer steps."""
    return f"step-{step:08d}.pt"


def digest_path(path: Path) -> Path:
    """Return the path of the digest file of a state file."""
    return path.with_name(f"{path.name}.sha256")


def header_of(step: int, world_size: int, version: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header of a state of format 2.

    Args:
        step: optimizer steps done.
        world_size: number of processes that trained.
        version: version of widekernel.
        settings: settings of the run, of which the header holds a digest.
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"step": step, "world_size": world_size, "version": version, "settings_sha256": digest}


# -- writing ---------------------------------------------------------------------------------------------------------


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state, and its digest before it, so that a crash at any time leaves a verifiable state of this name or none.

    The digest is computed of the bytes as they are produced, and of what the system returns for the file after it was
    forced to disk. This detects short and failed writes; it does not detect a defective sector, because the system
    usually returns what it holds in memory.

    Raises:
        CheckpointError: the two digests differ.
        OSError, RuntimeError: the file cannot be written.
    """
    wanted = ""

    def fill(temporary: Path) -> None:
        nonlocal wanted
        # Without a buffer, a forked process has nothing that it could write to the file a second time.
        with temporary.open("wb", buffering=0) as raw:
            file = _DigestingFile(raw)
            torch.save(state, file)  # type: ignore[arg-type]
            wanted = file.digest.hexdigest()

    def verify(complete: Path) -> None:
        if sha256_of(complete) != wanted:
            raise CheckpointError(f"{path.name} was not stored correctly: what is read back differs from what was written.")
        check_archive(complete)
        _write_digest(path, wanted)

    replace_atomically(path, fill, verify)


class _DigestingFile:
    """File that computes the digest of what is written to it, and writes all of it or raises an `OSError`."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        self.digest.update(rest)
        while rest:
            written = self._raw.write(rest)
            if not written:
                raise OSError(errno.EIO, "The system wrote nothing")
            rest = rest[written:]
        return length

    def flush(self) -> None:
        """Do nothing: the file has no buffer."""


def _write_digest(path: Path, digest: str) -> None:
    # If the state replaces one of the same step, the former digest is kept as well, so that either state file is accepted,
    # whichever of the two a crash leaves behind.
    former = _digests(path)[-1:] if path.exists() and digest_path(path).exists() else []
    lines = "".join(f"{value}  {path.name}\n" for value in [*former, digest])
    write_atomically(digest_path(path), lambda file: file.write(lines.encode()))


def _digests(path: Path) -> list[str]:
    return [line.split()[0] for line in digest_path(path).read_text().splitlines() if line.strip()]


# -- reading ---------------------------------------------------------------------------------------------------------


def verified_digest(path: Path) -> str:
    """Return the digest of a state file, which is that in its digest file.

    Raises:
        CheckpointError: the file or its digest is missing, or they do not match.
    """
    if path.exists() and not digest_path(path).exists():
        raise CheckpointError(
            f"{path.name} cannot be verified: its digest file {digest_path(path).name} is missing. Restore that file; or, "
            f"if you are sure that the state is intact, create it with `sha256sum {path.name} > {digest_path(path).name}`."
        )
    try:
        expected = _digests(path)
        found = sha256_of(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} has no readable digest file ({error}).") from error
    if found not in expected:
        raise CheckpointError(f"{path.name} does not match its SHA-256 digest: it is damaged or incomplete.")
    return found


def load_state(path: Path) -> dict[str, Any]:
    """Load one training state of format 1 or 2 after verifying its digest; nothing in the file is executed.

    Raises:
        CheckpointError: the file or its digest is missing, they do not match, or the format is unknown.
    """
    verified_digest(path)
    return read_state(path)


def read_state(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Load a training state whose digest has been verified.

    Args:
        path: the file.
        mapped: whether tensors are read only where they are used, from the file, which must not change meanwhile.

    Raises:
        CheckpointError: it is not a training state, or one of an unknown format.
    """
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds of errors for foreign files
        raise CheckpointError(f"{path.name} is not a training state ({in_short(error)}).") from error
    if type(state) is not dict:
        raise CheckpointError(f"{path.name} is not a training state: it holds a {type(state).__name__}.")
    if state.get("format") not in READABLE_FORMATS:
        raise CheckpointError(f"{path.name} has format {state.get('format')!r}; this version reads formats 1 and 2.")
    _check_contents(path, state)
    return state


def check_archive(path: Path) -> None:
    """Raise unless the file is an archive as `torch.save` writes it, which needs no more memory than its size.

    Raises:
        CheckpointError: it is not.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path.name} is not a training state ({in_short(error)}).") from error
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or sum(record.file_size for record in records) > path.stat().st_size:
        raise CheckpointError(f"{path.name} is not a training state: its records are compressed or overlap.")
    pickles = [record.file_size for record in records if record.filename.endswith(".pkl")]
    if len(pickles) != 1 or pickles[0] > _LONGEST_PICKLE:
        raise CheckpointError(
            f"{path.name} is not a training state: besides tensors, it holds {sum(pickles)} bytes in {len(pickles)} pickles "
            f"(at most {_LONGEST_PICKLE} in one)."
        )


def _check_contents(path: Path, state: dict[str, Any]) -> None:
    """Raise unless the tensors of a state are no larger than its file, and its header fits its name."""
    try:
        for place, tensor in tensors_of(state):
            strided = tensor.layout == torch.strided and tensor.device.type == "cpu"
            if not strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise CheckpointError(
                    f"{path.name} is not a training state: {place} claims {tensor.numel()} elements, which it does not hold."
                )
    except UnsavableError as error:
        raise CheckpointError(f"{path.name} is not a training state. {error}") from error
    header = state.get("header")
    if state["format"] == 1:
        return
    if type(header) is not dict or type(header.get("step")) is not int:
        raise CheckpointError(f"{path.name} is not a training state: it has no header.")
    if is_state(path) and header["step"] != step_of(path):
        raise CheckpointError(f"{path.name} holds the state after step {header['step']}: it was renamed or copied.")


def check_resumable(path: Path, state: dict[str, Any]) -> None:
    """Raise unless a run can be continued from a state.

    Raises:
        FormatError: it was saved by an earlier version.
        CheckpointError: its weights are not numbers.
    """
    if state["format"] != FORMAT:
        raise FormatError(
            f"{path.name} was saved by widekernel 0.5 or earlier (format {state['format']}). Training with this version "
            "draws other random numbers, so the run cannot be continued exactly. Finish it with widekernel 0.5, or start "
            f"a new run from its weights with --model.weights {path}."
        )
    for place, tensor in tensors_of({"model": state.get("model")}):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise CheckpointError(f"{path.name} cannot be resumed: {place} holds NaN.")


class FormatError(CheckpointError):
    """Error for a training state of an earlier version, from which a run cannot be continued exactly."""
