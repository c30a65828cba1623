"""The authors' published checkpoints by name: a catalog of where they are and what is in them, and their download."""

from widekernel.weights.catalog import Checkpoint, Source, find_checkpoint, list_checkpoints
from widekernel.weights.fetching import cached_file, fetch
from widekernel.weights.listener import Listener

__all__ = ["Checkpoint", "Listener", "Source", "cached_file", "fetch", "find_checkpoint", "list_checkpoints"]
