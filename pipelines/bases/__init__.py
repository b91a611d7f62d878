"""Pretrained models that lie within reach of every machine with a package index."""
