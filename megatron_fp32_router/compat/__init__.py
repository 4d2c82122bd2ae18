"""Does the plugin fit this Megatron? Source fingerprints, the behavioural probe, and the commands that report both.

Two halves. canonical, contracts, fingerprints, judge, accepted and gate read source text only; the gate runs inside a
training, called by registry.py before it applies a patch, so that half imports nothing but the standard library,
packaging, records and upstream. check, probe, doctor and what they print belong to the command line; only the probe
touches the laboratory.
"""
