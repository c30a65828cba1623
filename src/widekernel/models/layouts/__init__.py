"""Checkpoint layouts: their definition, registration and recognition, and conversion between them.

The layouts of a family are in `widekernel.models.<family>_layouts`, next to the family.
"""
