"""Base models, adapters, classifier heads and losses."""
