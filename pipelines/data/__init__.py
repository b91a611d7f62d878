"""Rows from any source, kinds of task, token ids."""
