"""An adapter as an MLflow model: returns the same predictions as `curlora predict`, by the same code.

`mlflow.pyfunc.load_model("models:/NAME@champion")` runs `pyfunc_entry.py` (stored in the model as code; nothing is
pickled). The model brings the packages curlora and pipelines as a wheel; its requirements list what these import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlflow.pyfunc import PythonModel

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, Problem
from pipelines.runs.identity import base_fingerprint

STEP = "step"  # name of the artifact folder: adapter/, heads.safetensors, config.json, model.json


class AdapterModel(PythonModel):
    """One adapter with its base, loaded once.

    Input: rows with the columns of one task. Parameter `task`: the name of a learned task; default: the one learned
    last. Output: one row per input row, with the keys that `pipelines.inference.predict.predict` returns.
    """

    def load_context(self, context) -> None:
        """Load base, adapter and heads; `model_config={"base_model": …}` sets another path of the same base.

        Raises:
            ConfigError: the base is not the one that the adapter was trained on.
        """
        from pipelines.inference.predict import load_folder  # imports torch

        folder = Path(context.artifacts[STEP])
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        raw["base_model"]["path"] = (context.model_config or {}).get("base_model") or raw["base_model"]["path"]
        config = PipelineConfig.model_validate(raw)
        facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        _check_base(config, facts["base_fingerprint"])
        self.trained = load_folder(folder, config, facts["tasks"])
        self.task = facts["task"]

    def predict(self, context, model_input, params: dict[str, Any] | None = None):
        """A data frame of predictions, in the order of the rows."""
        import pandas as pd  # slow

        task = (params or {}).get("task") or self.task
        rows = [_present(row) for row in pd.DataFrame(model_input).to_dict("records")]
        return pd.DataFrame(self.trained.answer(task, rows), index=getattr(model_input, "index", None))


def _present(row: dict) -> dict:
    """A row without the columns of other tasks, which MLflow fills with missing values; arrays become lists again."""
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
    return {name: value for name, value in plain.items() if value is not None and value == value}


def _check_base(config: PipelineConfig, expected: str) -> None:
    path = config.base_model.path
    try:
        found = base_fingerprint(config.base_model)
    except (OSError, ConfigError) as error:
        remedy = 'set its path: load_model(…, model_config={"base_model": …})'
        raise ConfigError([Problem("base_model", f"{path} cannot be read ({error}); {remedy}")]) from error
    if found != expected:
        raise ConfigError(
            [Problem("base_model", f"{path} has fingerprint {found}, the adapter was trained on {expected}")]
        )
