"""Sources, kinds of task, tokens."""
