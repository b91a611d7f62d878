"""The training loop of one step."""
