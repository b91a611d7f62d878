"""The frozen base model, adapters, classifier heads and losses."""
