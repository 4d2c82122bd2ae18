"""Checkpoints of the precision-aware optimizer."""
