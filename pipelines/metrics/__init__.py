"""What is measured: scores of answers, the score matrix and paired comparisons. Pure functions."""
