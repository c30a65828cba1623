"""Rules by which masks move: `exact` (with `semi_structured` for 2:4 blocks) and `published`."""
