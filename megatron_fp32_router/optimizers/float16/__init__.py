"""Checkpoints of Float16OptimizerWithFloat16Params."""
