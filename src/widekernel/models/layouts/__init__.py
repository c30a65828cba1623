"""Checkpoint layouts: what they are, how they are registered and recognized, and conversion between them.

The layouts of a family are in `widekernel.models.<family>_layouts`, beside the family.
"""
