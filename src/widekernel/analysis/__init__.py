"""Analysis of networks: parameters and operations."""
