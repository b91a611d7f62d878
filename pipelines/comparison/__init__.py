"""Methods side by side on one sequence."""
