"""The code that MLflow keeps in every logged adapter and runs when it loads one (models from code)."""

from mlflow.models import set_model

from pipelines.serving import AdapterModel

set_model(AdapterModel())
