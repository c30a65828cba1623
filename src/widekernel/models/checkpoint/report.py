"""The report on loading a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """The report on loading a checkpoint: which weights were loaded and which were not.

    Attributes:
        path: path of the file.
        container: name of the entry with the weights; "" for a bare state dict.
        layout: family whose official layout the weights are in, or "native".
        loaded: our keys that were filled.
        dropped: keys of the file that were skipped because they belong to a classifier for other classes or with another
            structure.
        missing: our keys that the file does not have (the head, for a backbone checkpoint); they keep their values.
        ignored: keys of the file that belong to other parts of a larger network, or to stages that this network lacks.
        generated: our keys of tables that the file lacks and that were generated as in the authors' code.
        unused: entries of the file that are not weights of a network, such as the optimizer's state.
        notes: removed prefixes, converted kernels, lost precision.
    """

    path: str
    container: str
    layout: str
    loaded: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    generated: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" ({self.container})" if self.container else ""
        lines = [f"{self.path}{where}: {len(self.loaded)} tensors in the layout {self.layout}"]
        for what in ("dropped", "missing", "ignored", "generated", "unused"):
            keys = getattr(self, what)
            if keys:
                lines.append(f"  {what} ({len(keys)}): {', '.join(keys)}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
