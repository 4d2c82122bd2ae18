"""The layer-wise distributed optimizer."""
