"""The configuration rejects what cannot work, where it is written, and says what to write instead."""

import dataclasses

import pytest

from curlora import CurloraConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("selection", "invers", "selection='invers' is not known.*Did you mean 'inverse'"),
        ("scale", "adma", "scale='adma' is not known.*Did you mean 'adam'"),
        ("carry", "stacked", "carry='stacked' is not known.*Did you mean 'stack'"),
        ("bias", "lora_only", "bias='lora_only' is not known.*Did you mean 'curlora_only'"),
        ("r", 0, "r=0 is not possible; use a positive integer"),
        ("r", 2.5, "r=2.5 is not possible"),
        ("r", True, "r=True is not possible"),
        ("alpha", 0, "alpha=0 is not possible"),
        ("dropout", 1.0, r"dropout=1.0 is not possible; use a number in \[0, 1\)"),
        ("max_update_norm", -1, "max_update_norm=-1 is not possible"),
        ("blocks", 2, "blocks=2 is not possible; use 1, or set carry='stack'"),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern"),
        ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern"),
        ("layers_pattern", "layers", "layers_pattern='layers' is not possible; use None, or set layers_to_transform"),
    ],
)
def test_impossible_values_name_field_value_and_remedy(field, value, message):
    with pytest.raises(ValueError, match=message):
        CurloraConfig(**{field: value})


def test_layers_cannot_be_counted_under_a_regular_expression():
    with pytest.raises(ValueError, match="layers_to_transform"):
        CurloraConfig(target_modules=".*q_proj", layers_to_transform=[0])


def test_every_field_of_its_own_is_explained_in_one_sentence():
    inherited = {field.name for field in dataclasses.fields(CurloraConfig.__mro__[1])}
    for field in dataclasses.fields(CurloraConfig):
        if field.name not in inherited:
            assert len(field.metadata["help"]) > 20, field.name


def test_the_configuration_survives_a_file(tmp_path):
    config = CurloraConfig(
        r=8,
        alpha=2.0,
        target_modules=["q_proj", "v_proj"],
        selection="leverage",
        whiten=False,
        carry="stack",
        blocks=3,
        max_update_norm=0.1,
        rank_pattern={"q_proj": 4},
    )
    config.save_pretrained(tmp_path)
    assert CurloraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
