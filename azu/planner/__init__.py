"""Pieces of a model onto nodes: pure, without Ray, clock or randomness."""
