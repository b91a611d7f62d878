"""The code that MLflow stores in every logged adapter and runs to load it (models from code)."""

from __future__ import annotations

import warnings

from mlflow.models import set_model

with warnings.catch_warnings(record=True):  # MLflow advises type hints, which cannot describe several task types
    from pipelines.inference.pyfunc import AdapterModel
set_model(AdapterModel())
