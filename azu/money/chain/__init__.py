"""The payment chain: its port, Hyperliquid's HTTP API, signed actions, and a user's wallet."""
