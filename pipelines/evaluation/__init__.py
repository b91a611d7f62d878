"""Scores of a model on evaluation sets."""
