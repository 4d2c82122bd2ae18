"""Does the plugin fit this Megatron? The commands that say so: check, doctor and the probe.

A training imports nothing of it. Only the probe uses the laboratory.
"""
