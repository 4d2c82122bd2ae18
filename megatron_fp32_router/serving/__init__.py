"""What becomes of an fp32 router on the way to the engine that serves it. Nothing here is imported in a training.

`contracts` needs the standard library only; `engine` and `parity` need torch; the rest needs what the `audit` extra has
(NumPy, ml_dtypes). No Megatron and no engine.
"""
