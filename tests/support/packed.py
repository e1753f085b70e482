"""A tiny Llama as llama.cpp's converter writes it."""

import json
from pathlib import Path

import gguf
import numpy as np
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: Path, path: Path, architecture: str = "llama") -> Path:
    """A checkpoint's weights, matrices as Q8_0, its configuration and its tokenizer."""
    model, config = LlamaForCausalLM.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            is_query = "q_proj" in name
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            values = _interleaved(values, heads)
        if values.ndim == 1:
            writer.add_tensor(_their_name(name), values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(_their_name(name), blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, saved: dict) -> None:
    vocabulary, special = saved["model"]["vocab"], {each["id"] for each in saved["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[number not in special] for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<|begin_of_text|>"])
    writer.add_add_bos_token(True)


def _their_name(name: str) -> str:
    *parts, kind = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return f"{WHOLE['.'.join(parts)]}.{kind}"
    return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.{kind}"


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """A rotary pair's rows beside one another, as GGUF has them."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
