"""PEFT's folder: the adapters, with the projection and the head beside them, and a card that says
what to do with these."""

from pathlib import Path

from mtllm_engine.config import flatten
from mtllm_engine.export import Options
from mtllm_engine.export.models import write_card, write_checkpoint
from mtllm_engine.files import sealed, sha256_of
from mtllm_engine.model import peft
from mtllm_engine.model.weights import RUN_FILES
from mtllm_engine.training.checkpoint import READS
from mtllm_engine.training.trained import Trained

MODELS = ("model.encoder", "model.decoder", "model.adapters")
CARD = """
# Adapters of $llm for the states of $encoder

Licences:

$licences

The encoder of $encoder reads a text, `projection.safetensors` takes its states to the width of
$llm, whose place of token embeddings they take, and the adapters teach the LLM to read them. A
text's vector is the mean of the LLM's last states, special tokens included.

- Attention is $attention: `is_causal` is $causal.
- The adapters are those of `AutoModel`. On a model around it, such as `AutoModelForCausalLM`, PEFT
  finds no place for them and says so.
- The projection comes first: on the LLM's own tokens these adapters mean nothing.
$base$head"""
WHOLE = """
```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, $published

ENCODER, LLM, ADAPTERS = "$encoder", "$llm", "."
options = {"dtype": torch.float32}
# A text stays a text, whatever control tokens it spells.
tokenizer = AutoTokenizer.from_pretrained(ENCODER, split_special_tokens=True, padding_side="right")
encoder = $published.from_pretrained(ENCODER, $options**options)$part.eval()
config = AutoConfig.from_pretrained(LLM)
config.is_causal = $causal
llm = AutoModel.from_pretrained(LLM, config=config, **options)
${merged}llm = PeftModel.from_pretrained(llm, ADAPTERS).eval()
projection = load_file(f"{ADAPTERS}/projection.safetensors")


@torch.no_grad()
def encode(texts$language):
$tell    limits = {"truncation": True, "max_length": $max_length}
    batch = tokenizer($texts, padding=True, return_tensors="pt", **limits)
    mask = batch["attention_mask"]
    states = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    states = torch.nn.functional.linear(states, projection["weight"], projection.get("bias"))
    states = llm(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


print(encode(["Habari ya dunia"]$example))
```

Texts of more than $max_length tokens were cut at the end of a word in training; here they are cut
between two tokens.
$spelled"""
PARTS = """
The encoder reads $parts one by one, and the LLM its own newlines between them. That takes more than
a few lines: `mtllm export --format folder` writes a folder that does it.
"""


def write(trained: Trained, draft: Path, options: Options) -> None:
    write_checkpoint(trained, trained.student, draft)
    flat, said = flatten(trained.config), trained.record.get("identity", {})
    identity = {key: flat[key] for key in READS}
    identity |= {key: said[key] for key in MODELS if key in said}
    identity |= {"task.name": trained.task, "model.teacher": trained.config.model.teacher and "-"}
    written = (*RUN_FILES, peft.FILE)
    hashes = {name: sha256_of(draft / name) for name in written if (draft / name).is_file()}
    record = {"identity": identity, "files": hashes}
    (draft / "state.json").write_bytes(sealed(record))
    write_card(trained, draft, CARD + (WHOLE if trained.config.data.parts == "whole" else PARTS))
