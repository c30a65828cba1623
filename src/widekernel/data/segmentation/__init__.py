"""Data sets for semantic segmentation: images with a class for every pixel."""
