"""Comparison of the held-out images of an evaluation with those of the run that trained the network."""

from typing import Any

from widekernel.data import DataConfig, ImageSource
from widekernel.engine.checkpoint import CheckpointStore
from widekernel.engine.run_folder import RunFolder
from widekernel.errors import CheckpointError
from widekernel.tasks.fingerprint import held_out_difference

_WHICH = ("name", "root", "val_split")


def location_of(data: DataConfig, source: ImageSource) -> str:
    """Return the location of the held-out images, for a message."""
    path = getattr(source, "path", None)
    if path is not None:
        return str(path.absolute())
    return data.name if data.root is None or data.name == "digits" else f"{data.name} in {data.root}"


def changed_images_warning(run: RunFolder | None, data: DataConfig, source: ImageSource) -> str:
    """Return a warning if the run's data settings now yield other held-out images.

    Returns:
        the warning; "" if the images are the same, or if other data settings were given.
    """
    if run is None:
        return ""
    saved: dict[str, Any] = run.read_config().get("data") or {}
    usual = DataConfig()
    if any(getattr(data, key) != saved.get(key, getattr(usual, key)) for key in _WHICH):
        return ""
    changed = held_out_difference(_description(run), source)
    if not changed:
        return ""
    return (
        f"Warning: the held-out images in {location_of(data, source)} are not those of the run in {run.path}: {changed}. "
        "Restore them, or name the data to evaluate with --data.root."
    )


def _description(run: RunFolder) -> dict[str, Any]:
    summary = run.read_summary()
    if summary is not None and "data" in summary:
        return summary["data"]  # type: ignore[no-any-return]
    try:
        state = CheckpointStore(run.checkpoints).load_latest()
    except CheckpointError:  # the states may be damaged while the model file is intact
        return {}
    return {} if state is None else state.get("data") or {}
