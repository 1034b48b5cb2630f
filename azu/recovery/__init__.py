"""What happens after a piece of a running model is lost, as state machines over ports."""
