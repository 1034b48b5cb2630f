"""Settings from the environment and from configs/: unknown keys are refused."""
