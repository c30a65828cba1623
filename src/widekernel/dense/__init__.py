"""Networks for dense prediction: feature pyramids on any backbone, segmentation and detection."""
