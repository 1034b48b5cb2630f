"""Durable jobs and their token streams."""
