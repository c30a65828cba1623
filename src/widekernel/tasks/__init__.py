"""Tasks: how a model is assembled, what it minimises and how it is measured."""
