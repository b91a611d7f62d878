"""Metrics as pure functions: scores of answers, the score matrix, paired tests."""
