"""The code that MLflow stores in every logged adapter and runs to load it (models from code).

The model brings this project as a wheel. It is imported from a copy of that, unless a process has imported the project
already, which then serves all of its models.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

from mlflow.models import set_model

if not {"curlora", "pipelines"} & sys.modules.keys():  # of two versions, no process may import parts of both
    for wheel in Path(__file__).parent.glob("code/curlora-*.whl"):
        folder = tempfile.mkdtemp(prefix="curlora-")  # unpacked: the project lists folders of its own
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        zipfile.ZipFile(wheel).extractall(folder)
        sys.path.insert(0, folder)
with warnings.catch_warnings(record=True):  # MLflow advises type hints, which cannot describe several task types
    from pipelines.inference.pyfunc import AdapterModel
set_model(AdapterModel())
