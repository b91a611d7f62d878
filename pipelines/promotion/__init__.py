"""The gate, promotion in the registry, and what follows a finished chain."""
