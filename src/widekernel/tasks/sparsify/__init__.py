"""Sparsification of a trained network: by magnitude, or with masks learned in a run of its own."""
