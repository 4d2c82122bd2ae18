"""Emerging optimizers: which of them nobody has run."""
