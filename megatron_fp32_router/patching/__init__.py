"""Applying patches: their records, the registry, the hooks, which Megatron this is, and whether a target fits it.

For a file that is byte for byte a known release's the gate has the answer; judge, canonical, fingerprints, source and
accepted are imported for other files only. Nothing here imports torch.
"""
