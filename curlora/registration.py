"""The adapter type in PEFT's tables: what ``register_peft_method`` does for the members of PEFT's own enum.

Mixed models (``get_peft_model(..., mixed=True)``) keep their tables as constants of a module and choose the tuner in
one method; both are extended here, without effect on other types.
"""

from __future__ import annotations

from typing import Any, Union

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import mixed
from peft.tuners.mixed import model as mixed_model

from .config import PEFT_TYPE, CurloraConfig
from .injection import inject
from .layer import CurloraLayer
from .model import CurloraModel


def register() -> None:
    """Make the type known to PEFT; calling it again changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = CurloraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = CurloraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = CurloraModel.prefix
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PEFT_TYPE] = CurloraModel
    if PEFT_TYPE not in mixed_model.COMPATIBLE_TUNER_TYPES:
        _extend_mixed_models()


def _extend_mixed_models() -> None:
    mixed.COMPATIBLE_TUNER_TYPES = mixed_model.COMPATIBLE_TUNER_TYPES = (
        *mixed_model.COMPATIBLE_TUNER_TYPES,
        PEFT_TYPE,
    )
    mixed_model.Configs = Union[mixed_model.Configs, CurloraConfig]  # noqa: UP007  of types that are values here
    mixed_model.Layers = (*mixed_model.Layers, CurloraLayer)
    mixed_model.PREFIXES.append(CurloraModel.prefix)
    others = mixed_model.MixedModel._create_and_replace

    def create_and_replace(self: mixed_model.MixedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, CurloraConfig):
            return others(self, config, *args, **kwargs)
        inject(self, config, *args, key=kwargs["current_key"])

    mixed_model.MixedModel._create_and_replace = create_and_replace
