"""Using trained adapters: predict, export, the MLflow model."""
