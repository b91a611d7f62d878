"""Export of an adapter: as a PEFT LoRA adapter, which any server loads, or merged into the full model.

Both are exact: ΔW = C M R is a LoRA with A = R and B = C M.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import CurloraConfig

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def to_lora(
    adapter: PeftModel | str | os.PathLike,
    directory: str | os.PathLike,
    *,
    base_model: nn.Module | None = None,
    adapter_name: str = "default",
) -> LoraConfig:
    """Write a CURLoRA adapter as a PEFT LoRA adapter directory and return its configuration.

    ``adapter``: a loaded model, or an adapter directory, whose base is then ``base_model`` or the one that its
    configuration names. The rank is r times the number of blocks; lora_alpha = α · rank, so that PEFT's scale
    lora_alpha / rank equals α. Trained modules_to_save are included. Raises ValueError if no layer is adapted.
    """
    model = _loaded(adapter, base_model, adapter_name)
    config = model.peft_config[adapter_name]
    cores = model.base_model.cores(adapter_name)
    if not cores:
        raise ValueError(f"Adapter {adapter_name!r} adapts no layer; there is nothing to convert.")
    _check_accepted(model, [name for name, _, _ in cores])
    state = _other_modules(model, adapter_name)
    for name, layer, core in cores:
        state.update(lora_weights(f"base_model.model.{name}", layer, core.settings.alpha, adapter_name))
    converted = _lora_config(model, config, cores)
    Path(directory).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(directory) / "adapter_model.safetensors", metadata={"format": "pt"})
    converted.save_pretrained(str(directory))
    return converted


def to_merged(
    adapter: PeftModel | str | os.PathLike,
    directory: str | os.PathLike,
    *,
    base_model: nn.Module | None = None,
    adapter_name: str = "default",
) -> nn.Module:
    """Merge a CURLoRA adapter into its base, save the full model and return it; a loaded model is merged in place."""
    model = _loaded(adapter, base_model, adapter_name)
    merged = model.merge_and_unload(safe_merge=True, adapter_names=[adapter_name])
    merged.save_pretrained(str(directory))
    return merged


def lora_weights(stem: str, layer: nn.Module, alpha: float, adapter_name: str) -> dict[str, Tensor]:
    """lora_A (k, n) = R and lora_B (m, k) = C M / α of one layer, fp32 on the CPU, under PEFT's names and shapes."""
    columns, middle, rows = layer.factors(adapter_name)
    down, up = (w.detach().float().cpu().contiguous() for w in (rows, columns @ middle / alpha))
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return {f"{stem}.lora_embedding_A": down, f"{stem}.lora_embedding_B": up}
    if isinstance(base, nn.modules.conv._ConvNd):
        if base.padding_mode != "zeros" or any(step != 1 for step in base.dilation):
            raise ValueError(
                f"{stem}: PEFT's LoRA of a convolution knows neither dilation nor padding_mode and would compute "
                "something else; use to_merged."
            )
        down, up = down.view(-1, *base.weight.shape[1:]), up.view(*up.shape, *[1] * len(base.kernel_size))
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


def _check_accepted(model: PeftModel, adapted: list[str]) -> None:
    """Raise ValueError if PEFT would not load a LoRA on these layers."""
    for name in adapted:
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model.base_model.model, name.rpartition(".")[2])
        except ValueError as error:
            raise ValueError(
                f"{name}: PEFT refuses a LoRA on this layer, and would not load the converted adapter ({error}) Use "
                "to_merged, or train an adapter without it."
            ) from error


def _other_modules(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """State that the adapter saves besides its factors: modules_to_save."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: value.contiguous() for key, value in state.items() if ".curlora_core." not in key}


def _lora_config(model: PeftModel, config: CurloraConfig, cores: list) -> LoraConfig:
    ranks = {name: core.size for name, _, core in cores}
    alphas = {name: core.settings.alpha * core.size for name, _, core in cores}
    rank, alpha = config.r * config.blocks, config.alpha * config.r * config.blocks
    taken = _taken_for_experts(model, list(ranks))
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        target_modules=_target_names(model, [name for name in ranks if name not in taken]),
        target_parameters=[f"{name}.weight" for name in taken] or None,
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        fan_in_fan_out=all(isinstance(layer.get_base_layer(), Conv1D) for _, layer, _ in cores),
        bias=config.bias.replace("curlora", "lora"),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _taken_for_experts(model: PeftModel, adapted: list[str]) -> list[str]:
    """Adapted dense layers that PEFT would take for experts, and must be told by their weights.

    Transformers 5 fuses the experts of some models. PEFT then looks for LoRA on ``gate_proj`` in the fused tensors,
    though the shared experts and dense blocks of those models still have a layer of that name.
    """
    base = model.get_base_model()
    return [name for name in adapted if _is_redirected(base, name.rpartition(".")[2])]


def _is_redirected(base: nn.Module, name: str) -> bool:
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, base, None)
    except ValueError:  # one of the layers that were fused together
        return True
    return set(config.target_modules) != {name}


def _target_names(model: PeftModel, adapted: list[str]) -> list[str]:
    """Last name components, which servers expect, if they select exactly the adapted layers; else full names."""
    short = {name.rpartition(".")[2] for name in adapted}
    layers = {name for name, _ in model.base_model.model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if layers == set(adapted) else sorted(adapted)


def _loaded(adapter: PeftModel | str | os.PathLike, base_model: nn.Module | None, adapter_name: str) -> PeftModel:
    if isinstance(adapter, PeftModel):
        if not isinstance(adapter.peft_config.get(adapter_name), CurloraConfig):
            raise ValueError(f"The model has no CURLoRA adapter {adapter_name!r}, only {list(adapter.peft_config)}.")
        return adapter
    config = CurloraConfig.from_pretrained(str(adapter))
    if base_model is None:
        base_model = _with_saved_vocabulary(_load_base(config), str(adapter))
    return PeftModel.from_pretrained(base_model, str(adapter), adapter_name=adapter_name, config=config)


def _with_saved_vocabulary(base: nn.Module, directory: str) -> nn.Module:
    """The base, its vocabulary resized to that of the embeddings that PEFT has saved with the adapter, if any."""
    ends = [f"{name}{middle}.weight" for name in EMBEDDING_LAYER_NAMES for middle in ("", ".base_layer")]
    with safe_open(Path(directory) / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        saved = [file.get_slice(key).get_shape()[0] for key in file.keys() if key.endswith(tuple(ends))]  # noqa: SIM118
    if saved and saved[0] != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(saved[0], mean_resizing=False)
    return base


def _load_base(config: CurloraConfig) -> nn.Module:
    """The base model that the configuration names, in the class in which it was trained."""
    mapping = config.auto_mapping or {}
    module = mapping.get("parent_library") or "transformers"
    name = mapping.get("base_model_class") or AUTO_CLASSES.get(config.task_type)
    if module.split(".")[0] != "transformers" or name is None or not config.base_model_name_or_path:
        raise ValueError(
            f"The adapter names the base {config.base_model_name_or_path!r} of class {module}.{name}, which cannot be "
            "loaded automatically; pass base_model=."
        )
    model_class = getattr(importlib.import_module(module), name)
    return model_class.from_pretrained(config.base_model_name_or_path, revision=config.revision)
