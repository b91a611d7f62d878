"""The demo's model, text and tasks, from what the environment itself contains."""
