"""Data only: network policy, Serve config, demo network and the built-in models."""
