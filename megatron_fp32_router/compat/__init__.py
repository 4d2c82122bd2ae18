"""Does the plugin fit this Megatron? The commands that say so: check, doctor and the probe.

Nothing of it is imported in a training. The probe alone touches the laboratory.
"""
