"""Who may do what: API keys, tickets, certificates, signatures and rate limits."""
