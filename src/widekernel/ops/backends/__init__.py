"""The backends: each computes the operators in its own way, or says why it cannot."""
