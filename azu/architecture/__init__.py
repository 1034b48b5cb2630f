"""What a model's config says, read on the meta device: layers, kinds, KV bytes, can it be cut."""
