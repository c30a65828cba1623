"""Transformations of networks that act on layers by their type."""
