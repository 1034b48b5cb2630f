"""Thin Ray wrappers, each around one domain object of azu."""
