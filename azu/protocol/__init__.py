"""Frozen messages shared by the client, the ingress and the actors, and the tensor frame.

Nothing here imports torch, Ray or Redis.
"""
