"""Official checkpoint layouts and the reading and writing of checkpoints."""
