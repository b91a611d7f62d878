"""The driver of a chain: which steps and cells are missing, and running them."""
