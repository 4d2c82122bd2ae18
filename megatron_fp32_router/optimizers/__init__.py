"""Megatron's optimizers, wrappers and checkpoints with fp32 router parameters: one folder for each of them."""
