"""Whether the held-out images that are evaluated are those of the run that a network comes from."""

from typing import Any

from widekernel.data import DataConfig, ImageSource
from widekernel.errors import CheckpointError
from widekernel.tasks.fingerprint import held_out_difference
from widekernel.training.checkpoint import CheckpointStore
from widekernel.training.run_folder import RunFolder

_WHICH = ("name", "root", "val_split")


def location_of(data: DataConfig, source: ImageSource) -> str:
    """Say where the held-out images are."""
    path = getattr(source, "path", None)
    if path is not None:
        return str(path.absolute())
    return data.name if data.root is None or data.name == "digits" else f"{data.name} in {data.root}"


def changed_images_warning(run: RunFolder | None, data: DataConfig, source: ImageSource) -> str:
    """Warn if the run's settings lead to other held-out images than it had; "" if not, or if others were asked for."""
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
    except CheckpointError:  # the network may be in a file of its own
        return {}
    return {} if state is None else state.get("data") or {}
