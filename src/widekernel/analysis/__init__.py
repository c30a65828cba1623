"""Analysis of networks: what they cost."""
