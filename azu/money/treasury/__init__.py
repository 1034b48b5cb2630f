"""Deposits and payouts: the only process that holds the private key."""
