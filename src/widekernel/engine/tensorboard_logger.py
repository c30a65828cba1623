"""Logger for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from widekernel.engine.logger import Logger, numbers_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(Logger):
    """Logger that writes the rows as event files of TensorBoard.

    Args:
        folder: folder of the event files
    """

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None

    @override
    def resume(self, rows: Sequence[Mapping[str, Any]], logged: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close(finished=False)
        is_new = not any(self.folder.glob("events.out.tfevents.*"))
        # TensorBoard hides what earlier files have from this step on.
        self._writer = SummaryWriter(str(self.folder), purge_step=rows[-1]["step"] + 1 if rows else 1)
        if is_new:
            for row in rows:
                self.row(row["step"], row)

    @override
    def row(self, step: int, row: Mapping[str, Any]) -> None:
        if self._writer is not None:
            for key, value in numbers_of(row).items():
                self._writer.add_scalar(key, value, step)

    @override
    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    @override
    def close(self, finished: bool) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
