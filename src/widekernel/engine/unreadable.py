"""Limit on the number of images that cannot be read."""

from widekernel.engine.error_context import TrainingError


def check_unreadable(names: set[str], limit: int, part: str) -> None:
    """Raise a `TrainingError` if more than `limit` different images could not be read.

    Args:
        names: names of the unreadable images.
        limit: the setting data.max_unreadable.
        part: what the images are for, such as "training".
    """
    if len(names) > limit:
        raise TrainingError(
            f"{len(names)} {part} images cannot be read, more than data.max_unreadable ({limit}). "
            f"The first: {min(names)}. Repair or remove the files, or raise the limit."
        )
