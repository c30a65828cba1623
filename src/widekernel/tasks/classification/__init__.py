"""Image classification: settings, the task itself, evaluation and complete runs."""
