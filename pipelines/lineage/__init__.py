"""MLflow: runs, logged models, the registry."""
