"""A look at the router tensors of a model that has just been wrapped."""
