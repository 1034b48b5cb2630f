"""API keys that a wallet's signature opens."""
