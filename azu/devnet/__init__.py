"""A local chain that speaks Hyperliquid's HTTP API: for the demo, tests and development."""
