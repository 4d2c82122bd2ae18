"""FSDP: torch's and Megatron's."""
