"""The driver of a chain: plans its steps and score cells and runs those that are missing."""
