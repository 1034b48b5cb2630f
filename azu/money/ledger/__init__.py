"""The ledger: double-entry accounts with pure rules, and one Redis adapter that applies the rules."""
