"""Place the pieces of a model on nodes: pure functions, without Ray, clock or randomness."""
