"""Ray Serve: HTTP in, domain calls out."""
