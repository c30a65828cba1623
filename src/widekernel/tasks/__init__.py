"""Tasks: building a model, training it for an objective, and evaluating it."""
