"""Signatures of networks that cannot be loaded here; they are recognized only so that errors can name them."""

from widekernel.models.layouts.registry import register_signature

register_signature("a ResNet", r"^layer\d\.\d+\.conv\d\.", "foreign")
register_signature("a vision transformer", r"^blocks\.\d+\.attn\.", "foreign")
