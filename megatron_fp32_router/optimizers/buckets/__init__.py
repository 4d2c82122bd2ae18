"""Gradient buckets of a virtual pipeline, cut by dtype."""
