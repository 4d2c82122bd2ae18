"""The balance update of expert_bias, in integers."""
