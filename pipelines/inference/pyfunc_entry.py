"""The code that MLflow keeps in every logged adapter and runs when it loads one (models from code)."""

from __future__ import annotations

import warnings

from mlflow.models import set_model

with warnings.catch_warnings(record=True):  # advice to give `predict` type hints; several kinds of task have no single
    from pipelines.inference.pyfunc import AdapterModel
set_model(AdapterModel())
