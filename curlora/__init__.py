"""CURLoRA for Transformers models: a PEFT tuner that trains one r×r matrix per layer, between columns and rows of W.

Importing this package registers the adapter type with PEFT, so that ``get_peft_model``, ``Trainer``,
``save_pretrained`` and ``PeftModel.from_pretrained`` support it. It does not import DeepSpeed, Ray or MLflow.
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import PEFT_TYPE, CurloraConfig
from .core import CurloraCore
from .layer import CurloraLayer, Linear
from .model import CurloraModel
from .record import BaseMismatchError, seal

# peft.utils.register_peft_method accepts only members of PEFT's own enum; these are the tables that it fills.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = CurloraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = CurloraModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = CurloraModel.prefix

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
