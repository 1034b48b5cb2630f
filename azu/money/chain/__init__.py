"""The chain: Hyperliquid's HTTP API, and a local devnet that speaks it."""
