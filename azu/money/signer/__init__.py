"""The signer: the platform's key, and the policy by which it signs."""
