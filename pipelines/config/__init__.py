"""The YAML of a chain, and every rule about it."""
