"""What becomes of an fp32 router on the way to the engine that serves it.

A training imports `contracts` if MEGATRON_FP32_ROUTER_LIKE is set, and nothing else of this. `contracts` needs only the
standard library, `engine` and `parity` need torch, and the rest needs NumPy and ml_dtypes, which the `audit` extra has.
Nothing needs Megatron or an engine.
"""
