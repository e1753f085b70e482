"""The LLM with the adapters in its weights, as an ordinary folder, and the encoder with the
projection in one beside it: what a server needs that takes embeddings in the place of a prompt.
"""

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from mtllm_engine.export import Options
from mtllm_engine.export.models import (
    copy_tokenizer,
    llm_dtype,
    merged_llm,
    write_card,
    write_checkpoint,
    write_config,
    write_encoder,
)
from mtllm_engine.export.streaming import write_safetensors
from mtllm_engine.model.families import decoder_spec, read_config
from mtllm_engine.model.tensors import resolve
from mtllm_engine.model.weights import HEAD_FILE, PROJECTION_FILE
from mtllm_engine.training.trained import Trained

ENCODER = "encoder"
# vLLM's name for Llama as a model of states that takes attention from both sides, and the mean from
# config.json's "pooling". Of other LLMs it has transformers' names.
BIDIRECTIONAL = "LlamaBidirectionalModel"
CARD = """
# $llm, taught to read the states of $encoder

Licences:

$licences

This folder is the LLM alone, its adapters merged into the weights: `AutoModel` opens it. Attention
is $attention. It reads no tokens of its own any more, but the projected states of the encoder in
`encoder/`, in the place of token embeddings; a text's vector is the mean of its last states,
special tokens included. (What else was trained lies in `encoder/` too: vLLM takes every safetensors
file of this folder for the LLM's.)
$base$head"""
WHOLE = """
A client: texts become embeddings here, and vectors on a server.

```python
import base64, io, json, urllib.request
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from $module import $alone

HERE = "encoder"
tokenizer = AutoTokenizer.from_pretrained(HERE)
encoder = $alone.from_pretrained(HERE, ${options}dtype=torch.float32).eval()
projection = load_file(f"{HERE}/projection.safetensors")


@torch.no_grad()
def embed(text$language):
$tell    limits = {"truncation": True, "max_length": $max_length}
    ids = tokenizer($text, return_tensors="pt", **limits).input_ids
    states = encoder(input_ids=ids).last_hidden_state[0]
    return torch.nn.functional.linear(states, projection["weight"], projection.get("bias"))


def ask(text$language, url="http://localhost:8000/v1/embeddings"):
    file = io.BytesIO()
    torch.save(embed(text$language).to(torch.bfloat16), file)
    part = {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}
    body = {"messages": [{"role": "user", "content": [part]}], "use_activation": False}
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), header)
    return json.load(urllib.request.urlopen(request))["data"][0]["embedding"]
```

A server (`use_activation: false` above: vectors are not brought to length 1), whose chat template
adds nothing to the embeddings:

    vllm serve . --runner pooling --enable-prompt-embeds$pooling \\
        --chat-template '{% for each in messages %}{{ each["content"] }}{% endfor %}'

Or in one process, with vLLM's own Python:

    llm = LLM(".", runner="pooling", enable_prompt_embeds=True)
    llm.embed([{"prompt_embeds": embed(text$language)}],
              pooling_params=PoolingParams(use_activation=False))

What was tried: `embed`, its embeddings read by transformers' `AutoModel`, against the engine's
vectors. What was not: any server. Llama's name of the architecture and of its pooling, and that
pooling models take prompt embeddings (since September 2026), were read in vLLM's source; there
`/v1/embeddings` has no field for embeddings of its own, and that its chat messages take them like
those of chat completions is likely, and not known.

Texts of more than $max_length tokens were cut at the end of a word in training; here they are cut
between two tokens.
$spelled"""
PARTS = """
The encoder reads $parts one by one, and the LLM its own newlines between them. That takes more than
a short client: `mtllm export --format folder` writes a folder that does it.
"""


def write(trained: Trained, draft: Path, options: Options) -> None:
    causal = trained.config.model.causal
    source, dtype = resolve(trained.config.model.decoder), options.dtype
    write_safetensors(draft / "model.safetensors", merged_llm(trained, dtype))
    changed = {} if causal else {"is_causal": False, "pooling": "avg"}
    family = decoder_spec(read_config(source, "the LLM")).family
    is_renamed = family == "llama" and not causal
    architecture = BIDIRECTIONAL if is_renamed else MODEL_MAPPING_NAMES[family]
    stored = llm_dtype(trained, dtype)
    write_config(source, draft, stored, architectures=[architecture], **changed)
    copy_tokenizer(source, draft)
    write_encoder(trained, draft / ENCODER, dtype)
    kept = (PROJECTION_FILE, HEAD_FILE)
    write_checkpoint(trained, trained.student, draft / ENCODER, kept)
    write_card(trained, draft, CARD + (WHOLE if trained.config.data.parts == "whole" else PARTS))
