"""Ranks compare what they run, before the first step."""
