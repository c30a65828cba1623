"""Looking at networks: what they cost."""
