"""Pictures that training runs write: drawing one takes longer than a short run, so few tests let them be drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from widekernel.engine import curves
from widekernel.files import write_file
from widekernel.sparsity import plot as masks

_STAND_IN = b"a picture"


@contextmanager
def _drawn_by(save_curves: Callable[..., None], plot_masks: Callable[..., bytes]) -> Iterator[None]:
    with (
        mock.patch("widekernel.engine.loop.save_curves", save_curves),
        mock.patch("widekernel.tasks.results.save_curves", save_curves),
        mock.patch("widekernel.sparsity.report.plot", plot_masks),
    ):
        yield


def _write_stand_in(rows: Any, metrics: Any, path: Path) -> None:
    write_file(path, _STAND_IN)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let runs in this process, and in those forked from it, write a few bytes in place of their pictures."""
    with _drawn_by(_write_stand_in, lambda snapshot: _STAND_IN):
        yield


@contextmanager
def drawn() -> Iterator[None]:
    """Let runs in this process draw their pictures, as they do for users."""
    with _drawn_by(curves.save_curves, masks.plot):
        yield
