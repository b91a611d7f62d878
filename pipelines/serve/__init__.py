"""The OpenAI-compatible server: one base in memory, many adapters, and a champion that changes while it answers."""
