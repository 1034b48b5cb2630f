"""Double-entry accounts: pure rules and one Redis adapter of the same rules."""
