"""Logits in true fp32, forward and backward."""
