"""What runs inside a training: casts, gating, balance update and the look after wrapping.

Every function named in records/ takes Megatron's original and returns a plain closure around or instead of it.
torch is imported here; this package is loaded only when Megatron's own modules are.
"""
