"""fp32 router parameters inside Megatron's optimizers and checkpoints."""
