"""Inference with trained adapters: predict, export, the MLflow model."""
