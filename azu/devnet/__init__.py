"""The devnet: a local chain with Hyperliquid's HTTP API, for the demo, tests and development."""
