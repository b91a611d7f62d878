"""Scores a model on evaluation sets, lets it answer sample prompts, and samples text from it."""
