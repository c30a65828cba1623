"""Networks for dense prediction, segmentation and detection, on any backbone."""
