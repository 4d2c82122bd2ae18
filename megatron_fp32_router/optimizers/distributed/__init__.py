"""The distributed optimizer: its groups, and its checkpoints in every format."""
