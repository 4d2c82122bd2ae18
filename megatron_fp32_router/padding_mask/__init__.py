"""Padding tokens are not counted."""
