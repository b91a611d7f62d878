"""CURLoRA for Transformers models: a PEFT tuner that trains one r×r matrix per layer, between columns and rows of W.

Importing this package registers the adapter type with PEFT, so that ``get_peft_model``, ``Trainer``,
``save_pretrained`` and ``PeftModel.from_pretrained`` support it. It does not import DeepSpeed, Ray or MLflow.
"""

from .config import PEFT_TYPE, CurloraConfig
from .core import CurloraCore
from .layer import CurloraLayer, Linear
from .model import CurloraModel
from .record import BaseMismatchError, seal
from .registration import register

register()

__all__ = [
    "PEFT_TYPE",
    "BaseMismatchError",
    "CurloraConfig",
    "CurloraCore",
    "CurloraLayer",
    "CurloraModel",
    "Linear",
    "seal",
]
