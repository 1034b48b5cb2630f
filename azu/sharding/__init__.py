"""Cutting checkpoints into shards, verifying them, and the node's content-addressed shard cache."""
