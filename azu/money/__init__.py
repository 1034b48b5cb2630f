"""Prices, quotes and the division of a charge: pure integer rules."""
