"""Sparsity that is part of the checkpoint: dynamic sparse training, coarse pruning, learned 2:4 masks."""
