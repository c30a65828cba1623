"""The rules by which masks move: `exact` and `published`."""
