"""Limit on the number of samples that cannot be read."""

from widekernel.engine.error_context import TrainingError

SAMPLES = ("sample", "samples")
"""What messages call one sample, and several, unless the task knows better words."""


def check_unreadable(names: set[str], limit: int, part: str, noun: str = SAMPLES[1]) -> None:
    """Raise a `TrainingError` if more than `limit` different samples could not be read.

    Args:
        names: names of the unreadable samples.
        limit: the setting data.max_unreadable.
        part: what the samples are for, such as "training".
        noun: what they are called.
    """
    if len(names) > limit:
        raise TrainingError(
            f"{len(names)} {part} {noun} cannot be read, more than data.max_unreadable ({limit}). "
            f"The first: {min(names)}. Repair or remove the files, or raise the limit."
        )
