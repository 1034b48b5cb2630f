"""Deposits, payouts, withdrawals and receipts: the only process that holds the platform's private key."""
