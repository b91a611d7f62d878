"""Scores a model on evaluation sets, and samples text from it."""
