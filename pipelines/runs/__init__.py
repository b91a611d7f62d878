"""The run directory, the only source of truth about a run, and its typed records."""
