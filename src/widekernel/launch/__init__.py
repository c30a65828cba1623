"""Starting of processes and cluster jobs; nothing here knows of models."""
