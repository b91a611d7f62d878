"""Kept for models that MLflow registries already hold: their code imports the adapter model from here."""

from pipelines.inference.pyfunc import AdapterModel as AdapterModel
