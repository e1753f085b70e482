"""Small, real Hugging Face checkpoints with random weights, real tokenizers and real shards, for
tests.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
    PreTrainedTokenizerFast,
)

from mtllm_engine.config import Config, from_dict
from mtllm_engine.data import sources
from mtllm_engine.world import World

WORDS = Path(random.__file__).read_text().split()


def texts(count: int, *, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of 1 to `longest` words of real text, log-normally distributed."""
    generator = random.Random(seed)
    lengths = [min(longest, 1 + int(generator.lognormvariate(2.3, 0.8))) for _ in range(count)]
    return [" ".join(generator.choices(WORDS, k=length)) for length in lengths]


def build_world(rank: int = 0, size: int = 1) -> World:
    """One rank without a process group: enough for everything that makes no collective."""
    return World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"))


def build_encoder(
    folder: Path,
    *,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    vocab_size: int = 0,
    samples: Sequence[str] = (),
) -> Path:
    """An NLLB-shaped checkpoint with its tokenizer, trained on `samples` too."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(
        [*texts(200), *samples], trainers.BpeTrainer(vocab_size=400, special_tokens=specials)
    )
    tokenizer = NllbTokenizer(vocab=bpe.get_vocab(), merges=_merges(bpe))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = M2M100Config(
        vocab_size=vocab_size or len(tokenizer),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_position_embeddings=256,
        scale_embedding=True,
    )
    _randomise(M2M100ForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def build_decoder(
    folder: Path,
    *,
    width: int = 48,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    rope: dict | None = None,
    max_shard_size: str = "5GB",
    vocab_size: int = 0,
    samples: Sequence[str] = (),
    **options,
) -> Path:
    """A Llama-shaped checkpoint with its tokenizer, trained on `samples` too."""
    num_tokens = build_llm_tokenizer(folder, samples)
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=vocab_size or num_tokens,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=2 * width,
        max_position_embeddings=256,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        **options,
    )
    _randomise(LlamaForCausalLM(config)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def build_llm_tokenizer(folder: Path, samples: Sequence[str] = ()) -> int:
    """An LLM's tokenizer, trained on `samples` too. Returns: How many tokens it has."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    start = "<|begin_of_text|>"
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[start], initial_alphabet=alphabet)
    bpe.train_from_iterator([*texts(200), *samples], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, bpe.token_to_id(start))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=start)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def build_corpus(folder: Path, count: int, *, num_shards: int = 3, seed: int = 0) -> Path:
    """A packed corpus of random documents."""
    return pack_lines(folder, texts(count, seed=seed), num_shards=num_shards)


def pack_lines(folder: Path, lines: Sequence[str], *, num_shards: int) -> Path:
    """A packed corpus with a document for each line."""
    source = folder.with_suffix(".txt")
    source.write_text("\n".join(lines))
    sources.pack([source], folder, language="eng_Latn", shards=num_shards, progress=False)
    return folder


def build_lines(folder: Path, count: int, *, num_shards: int = 3, seed: int = 0) -> Path:
    """A packed corpus of documents of several lines and sentences; one in three is one of each."""
    generator, documents = random.Random(seed), []
    for number, text in enumerate(texts(count, seed=seed)):
        words = text.split()
        for at in range(2, len(words), 3) if number % 3 else ():
            words[at] += generator.choice([".", ".\n", "\n\n"])
            words[at + 1 : at + 2] = [each.capitalize() for each in words[at + 1 : at + 2]]
        documents.append({"text": " ".join(words)})
    source = folder.with_suffix(".jsonl")
    source.write_text("\n".join(map(json.dumps, documents)))
    sources.pack([source], folder, language="eng_Latn", shards=num_shards, progress=False)
    return folder


def build_config(folder: Path, **sections) -> Config:
    """A run over `encoder`, `decoder`, `train` and `validation` in a folder; keyword arguments
    override by section.
    """
    tree = {
        "run": {"dir": str(folder / "run"), "log_every": 1},
        "validation": {"every": 1000},
        "model": {
            "encoder": str(folder / "encoder"),
            "decoder": str(folder / "decoder"),
            "dtype": "float32",
        },
        "lora": {"rank": 4, "alpha": 8.0},
        "data": {"train": str(folder / "train"), "lanes": 8, "pack_documents": 2, "max_length": 64},
        "optim": {"steps": 10, "lr": 1e-3},
        "memory": {"max_tokens": 160},
        "zero": {"stage": 3},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return from_dict(tree)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every part of the model shows in its output; norms and biases
    included.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "embed" not in name and "shared" not in name:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model
