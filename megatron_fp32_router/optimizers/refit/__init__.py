"""Refit: weights handed from a training to the model that generates."""
