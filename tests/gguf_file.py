"""Writes a Llama-shaped model and its byte-level tokenizer as a GGUF file, the way llama.cpp's converter does."""

import json
from pathlib import Path

import gguf
import torch

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


def write_gguf(
    path: Path, model, tokenizer, kind: str = "F32", template: str | None = None, leave_out=(), extra=()
) -> Path:
    """Write the file; matrices are quantised as `kind`, vectors are float32.

    Args:
        leave_out: tensors, by their names in the file, that it lacks.
        extra: (name, tensor) pairs that it holds besides.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, template)
    for name, tensor in [*_tensors(model), *extra]:
        if name in leave_out:
            continue
        array = tensor.detach().float().contiguous().numpy()
        if array.ndim == 2 and kind != "F32":
            packed = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(array, packed), raw_dtype=packed)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(model, kind: str):
    """The model after its matrices went through `kind`: what a file of that kind can hold."""
    packed = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                stored = gguf.quants.quantize(parameter.numpy(), packed)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, packed)))
    return model


def _add_tokenizer(writer, tokenizer, template: str | None) -> None:
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = raw["model"]["merges"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in tokenizer.all_special_tokens else NORMAL for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if template:
        writer.add_chat_template(template)


def _tensors(model):
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem == "lm_head" and model.config.tie_word_embeddings:
            continue
        if stem in WHOLE:
            yield f"{WHOLE[stem]}.weight", tensor
            continue
        _, _, number, inner = stem.split(".", 3)
        short = NAMES[inner]
        if short in heads:  # llama.cpp rotates pairs of neighbours, Transformers halves
            count = heads[short]
            halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, -1)
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        yield f"blk.{number}.{short}.weight", tensor
