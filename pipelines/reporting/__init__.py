"""Figures, tables, progress bars and the report page of a run."""
