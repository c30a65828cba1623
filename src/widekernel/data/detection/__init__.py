"""Data sets for object detection and instance segmentation: images with boxes, classes and masks."""
