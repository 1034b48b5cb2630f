"""The light client: generate, stream, log in, deposit."""
