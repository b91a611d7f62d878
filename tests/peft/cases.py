"""CURLoRA as cases of PEFT's test matrix: beside LoRA and VeRA in its lists, and what is replaced in its files."""

from __future__ import annotations

QUICK = ("test_custom_models.py", "test_config.py")
FILES = (
    *QUICK,
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
)

CUSTOM = """
    ("Vanilla MLP 1 CURLoRA", "MLP", CurloraConfig, {"target_modules": "lin0", "r": 4}),
    ("Vanilla MLP 2 CURLoRA", "MLP", CurloraConfig, {"target_modules": ["lin0"], "r": 4}),
    ("Vanilla MLP 3 CURLoRA", "MLP", CurloraConfig, {"target_modules": ["lin1"], "r": 2}),
    ("Vanilla MLP 4 CURLoRA", "MLP", CurloraConfig, {"target_modules": ["lin0", "lin1"], "r": 2}),
    ("Vanilla MLP 5 CURLoRA", "MLP", CurloraConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "r": 4}),
    ("Vanilla MLP 6 CURLoRA", "MLP", CurloraConfig, {"target_modules": ["lin0"], "alpha": 4, "dropout": 0.1, "r": 4}),
    ("Vanilla MLP 7 CURLoRA", "MLP", CurloraConfig, {"target_modules": ["lin0"], "whiten": False, "r": 4}),
    ("Vanilla MLP 8 CURLoRA", "MLP", CurloraConfig, {"target_modules": ["lin0"], "selection": "deim", "r": 4}),
    ("Vanilla MLP 9 CURLoRA", "MLP", CurloraConfig, {"target_modules": ["lin0"], "scale": "rsqrt", "r": 4}),
    ("Vanilla MLP 10 CURLoRA", "MLP", CurloraConfig, {"r": 2}),
    ("Embedding + transformers Conv1D 1 CURLoRA", "EmbConv1D", CurloraConfig, {"target_modules": ["conv1d"], "r": 1}),
    ("Embedding + transformers Conv1D 2 CURLoRA", "EmbConv1D", CurloraConfig, {"target_modules": ["emb"], "r": 4}),
    (
        "Embedding + transformers Conv1D 3 CURLoRA",
        "EmbConv1D",
        CurloraConfig,
        {"target_modules": ["emb", "conv1d"], "r": 1},
    ),
    ("Conv1d CURLoRA", "Conv1d", CurloraConfig, {"target_modules": ["conv1d"], "r": 1}),
    ("Conv2d 1 CURLoRA", "Conv2d", CurloraConfig, {"target_modules": ["conv2d"], "r": 4}),
    ("Conv2d 2 CURLoRA", "Conv2d", CurloraConfig, {"target_modules": ["conv2d", "lin0"], "r": 2}),
    ("Conv3d CURLoRA", "Conv3d", CurloraConfig, {"target_modules": ["conv3d"], "r": 4}),
"""

SEVERAL = """
    (
        "CURLoRA Same",
        "curlora",
        CurloraConfig,
        {"target_modules": ["lin0"], "init_weights": False, "r": 4},
        {"target_modules": ["lin0"], "init_weights": False, "r": 4},
    ),
    (
        "CURLoRA Different",
        "curlora",
        CurloraConfig,
        {"target_modules": ["lin0"], "init_weights": False, "r": 4},
        {"target_modules": ["lin1"], "init_weights": False, "r": 2},
    ),
"""


def _config(task: str) -> str:
    return f'\n    (CurloraConfig, {{"task_type": "{task}", "target_modules": None, "r": 8, "dropout": 0.05}}),\n'


IMPORT = "from curlora import CurloraConfig  # added by tests/peft/cases.py\n"
ADDED: dict[str, dict[str, str]] = {
    "test_custom_models.py": {"\nTEST_CASES = [": CUSTOM, "\nMULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [": SEVERAL},
    "test_decoder_models.py": {"\nALL_CONFIGS = [": _config("CAUSAL_LM")},
    "test_encoder_decoder_models.py": {"\nALL_CONFIGS = [": _config("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models.py": {"\nALL_CONFIGS = [": _config("FEATURE_EXTRACTION")},
    "test_seq_classifier.py": {"\nALL_CONFIGS = [": _config("SEQ_CLS")},
    "test_token_classification_qa.py": {
        "    return [\n": '        (CurloraConfig, {"task_type": task_type, "target_modules": None, "r": 8}),\n'
    },
    "test_config.py": {"    (VeraConfig, {}),\n": "    (CurloraConfig, {}),\n"},
}
"""File → after which text → the added cases."""

REPLACED: dict[str, dict[str, str]] = {
    "testing_common.py": {
        "from diffusers import StableDiffusionPipeline\n": "StableDiffusionPipeline = ()  # not installed\n",
        # mixed batches, with and without beam search, and Conv1D layers: tested for the types that have them
        "config_cls not in (LoraConfig, RoadConfig):": "config_cls not in (LoraConfig, RoadConfig, CurloraConfig):",
        "config_cls not in (LoraConfig,):": "config_cls not in (LoraConfig, CurloraConfig):",
        "if config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig):": (
            "if config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig, CurloraConfig):"
        ),
    },
    # it would go online for the first access to every model
    "testing_utils.py": {'is_offline = override.get("HF_HUB_OFFLINE", False) == "1"': "is_offline = True"},
}
"""File → text of PEFT's → what stands there instead."""


def patched(file: str, text: str) -> str:
    """A file of PEFT's tests with CURLoRA in it; ValueError if a line to change is not where it was."""
    changes = {anchor: anchor + addition for anchor, addition in ADDED.get(file, {}).items()} | REPLACED.get(file, {})
    for old, new in changes.items():
        if text.count(old) != 1:
            raise ValueError(f"{file} of this version of PEFT has no single {old.strip()!r}; mend tests/peft/cases.py")
        text = text.replace(old, new)
    if any("CurloraConfig" in new for new in changes.values()):
        first = text.index("\nfrom peft import") + 1
        text = text[:first] + IMPORT + text[first:]
    return text
