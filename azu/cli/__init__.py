"""The azu command: the composition root."""
