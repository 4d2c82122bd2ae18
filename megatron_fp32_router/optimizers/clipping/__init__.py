"""Norms and clipping over gradients of several dtypes."""
