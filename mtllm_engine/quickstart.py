"""The quickstart's world: English prose that comes with Python, and two tiny models that have really learned it.

Random models have nothing to distil, so both are trained: the encoder to fill in masked tokens, the LLM to predict the
next token, each with its own vocabulary. What is written are ordinary Hugging Face checkpoints: an M2M-100 in the shape
of NLLB with an NllbTokenizer, and a Llama with a byte-level BPE.
"""

import ast
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES
from transformers.utils.logging import disable_progress_bar

from mtllm_engine.config import load
from mtllm_engine.data.sources import pack
from mtllm_engine.metrics import print_table
from mtllm_engine.report import summary
from mtllm_engine.world import device_type

LANGUAGE = "eng_Latn"
SHORTEST, LONG_ENOUGH = 80, 240  # characters: what a document needs at least, and where the next one starts
MAX_TOKENS = 128
BATCH_TOKENS = 1024
MASKED = 0.25
WARMUP_STEPS = 40
NOT_PROSE = re.compile(r">>>|::=|\.\. [a-z-]+::|[=\-*+~^#|]{4,}")
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[\"'(]?[A-Z])")
SKIPPED_PACKAGES = {"site-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo", "pydoc_data", "encodings"}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m mtllm_engine.quickstart [CONFIG [section.key=value ...]]`: world, shards, distillation, result."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["configs/quickstart.toml"]
    if device_type() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a warning, from where transformers looks for DeepSpeed
    try:
        config = load(arguments[0], arguments[1:])
        folder = Path(config.model.encoder).parent
        write_world(folder)
        for source, corpus in (("train", config.data.train[0]), ("validation", config.data.validation)):
            if not (Path(corpus) / "manifest.json").is_file():
                pack([folder / f"{source}.jsonl"], corpus, language=LANGUAGE, shards=4, licence="PSF-2.0")
    except (ValueError, OSError) as error:
        print("mtllm: error:", error, file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "mtllm_engine.cli", "train", *arguments, "--gpus", "2"]
    if status := subprocess.run(command).returncode:
        return status
    run = Path(config.run.dir)
    print()
    print_table(summary(run) | {"curve": str(run / "curve.png"), "report": str(run / "report.html")})
    return 0


def collect_prose() -> list[str]:
    """English documents of one line each, from Python's own documentation: no duplicates, always in one order."""
    documents: dict[str, str] = {}
    for text in [*_help_topics(), *_docstrings(Path(sysconfig.get_path("stdlib")))]:
        for document in _documents(text):
            documents.setdefault(_fingerprint(document), document)
    return list(documents.values())


def split_prose(texts: Iterable[str], held_out: float = 0.1) -> tuple[list[str], list[str]]:
    """Training and held-out documents: a document's own hash decides, so the split survives any change of the others.

    Args:
        texts: Documents; of those that start alike (see `_fingerprint`) only the first is kept.
        held_out: The share held out, from 0 to 1.
    """
    training, validation = [], []
    for key, text in {_fingerprint(text): text for text in reversed(list(texts))}.items():
        share = int(key, 16) / 16 ** len(key)
        (validation if share < held_out else training).append(text)
    return training[::-1], validation[::-1]


def write_world(
    folder: Path, *, encoder_steps: int = 300, decoder_steps: int = 300, vocab_size: int = 1000, seed: int = 0
) -> None:
    """Writes `train.jsonl`, `validation.jsonl` (one {"text": ...} a line), `encoder/` and `decoder/`.

    What exists is complete, because it got its name last, and is left alone. Both models see the training text only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()  # saving a small model needs none
    if not (folder / "train.jsonl").exists():
        training, validation = split_prose(collect_prose())
        _write_jsonl(folder / "validation.jsonl", validation)
        _once(folder / "train.jsonl", lambda path: _write_jsonl(path, training))
    with (folder / "train.jsonl").open(encoding="utf-8") as lines:
        training = [json.loads(line)["text"] for line in lines]
    options = {"vocab_size": vocab_size, "seed": seed}
    _once(folder / "encoder", lambda path: build_encoder(path, training, steps=encoder_steps, **options))
    _once(folder / "decoder", lambda path: build_decoder(path, training, steps=decoder_steps, **options))


def build_encoder(
    folder: Path,
    texts: Sequence[str],
    *,
    steps: int = 300,
    vocab_size: int = 1000,
    width: int = 128,
    layers: int = 3,
    lr: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Trains and saves an NLLB-shaped checkpoint with its tokenizer; returns the loss of each step.

    Only the encoder learns, from masked tokens. The decoder that the architecture asks for stays random.
    """
    tokenizer = _train_nllb_tokenizer(texts, vocab_size)
    torch.manual_seed(seed)
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=1024,
        scale_embedding=True,
        init_std=width**-0.5,  # fairseq's own for embeddings; a smaller one drowns tokens in their positions
        dropout=0.0,
        attention_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    )
    model = M2M100ForConditionalGeneration(config)
    loss = _masked_token_loss(model, tokenizer.mask_token_id)
    losses = _train(model, loss, _encode(tokenizer, texts), steps=steps, lr=lr, title="encoder")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def build_decoder(
    folder: Path,
    texts: Sequence[str],
    *,
    steps: int = 300,
    vocab_size: int = 1000,
    width: int = 128,
    layers: int = 4,
    lr: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Trains a Llama to predict next tokens and saves it with its tokenizer; returns the loss of each step."""
    tokenizer = _train_llama_tokenizer(texts, vocab_size)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=3 * width,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.5 * width**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    loss = _next_token_loss(model)
    losses = _train(model, loss, _encode(tokenizer, texts), steps=steps, lr=lr, title="decoder")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def _help_topics() -> list[str]:
    """The texts of `help()`, in the order of their names; a Python built without them has none."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]


def _docstrings(root: Path) -> Iterator[str]:
    """The docstrings of every module under `root`, which is parsed and never imported."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_PACKAGES.isdisjoint(path.relative_to(root).parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""


def _documents(text: str) -> Iterator[str]:
    """A text's sentences, joined to documents of useful length; what is no prose ends the document before it."""
    document = ""
    for paragraph in [*re.split(r"\n\s*\n", text), ""]:
        sentences = SENTENCE_END.split(" ".join(paragraph.split())) if _is_prose(paragraph) else [""]
        for sentence in sentences:
            document = f"{document} {sentence}".strip()
            if len(document) >= LONG_ENOUGH or not sentence:
                if len(document) >= SHORTEST:
                    yield document
                document = ""


def _is_prose(paragraph: str) -> bool:
    """Whether letters and spaces make up nearly all of it: code, grammars and tables do without."""
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return letters > 0.85 * len(paragraph) and not NOT_PROSE.search(paragraph)


def _fingerprint(text: str) -> str:
    """A hash of the first letters, case and spacing aside, so that copies with another ending count as the same."""
    letters = re.sub(r"[^a-z]", "", text.lower())[:60]
    return hashlib.sha256(letters.encode()).hexdigest()[:16]


def _train_nllb_tokenizer(texts: Iterable[str], vocab_size: int) -> NllbTokenizer:
    """NLLB's kind: SentencePiece BPE with its normaliser; `<mask>` and 202 language codes after the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=f"{folder}/sentencepiece.bpe",  # the name that NLLB's repository gives it
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            num_threads=1,  # with more, ties fall differently from run to run
            minloglevel=2,
        )
        return NllbTokenizer.from_pretrained(folder, extra_special_tokens=FAIRSEQ_LANGUAGE_CODES, src_lang=LANGUAGE)


def _train_llama_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Llama 3's kind: BPE on bytes, and a `<|begin_of_text|>` that it puts before every text by itself."""
    start, end = "<|begin_of_text|>", "<|end_of_text|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[start, end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, bpe.token_to_id(start))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=start, eos_token=end)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids as the tokenizer itself makes them, special tokens included."""
    return tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]


def _masked_token_loss(model: M2M100ForConditionalGeneration, mask_id: int) -> Callable[..., torch.Tensor]:
    def loss(ids_BL: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
        inner_BL = real_BL & real_BL.roll(-1, 1)  # neither language token nor </s>: those are no puzzle
        inner_BL[:, 0] = False
        masked_BL = inner_BL & (torch.rand(ids_BL.shape) < MASKED)
        hidden_BLE = model.model.encoder(ids_BL.masked_fill(masked_BL, mask_id), real_BL).last_hidden_state
        # Visible tokens are asked for too: otherwise what is learned first is one state for all, the words' frequency.
        return functional.cross_entropy(model.lm_head(hidden_BLE[inner_BL]), ids_BL[inner_BL])

    return loss


def _next_token_loss(model: LlamaForCausalLM) -> Callable[..., torch.Tensor]:
    def loss(ids_BL: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
        hidden_BLD = model.model(ids_BL, real_BL).last_hidden_state[:, :-1]
        real_BL = real_BL[:, 1:]
        return functional.cross_entropy(model.lm_head(hidden_BLD[real_BL]), ids_BL[:, 1:][real_BL])

    return loss


def _train(
    model: nn.Module,
    loss: Callable[..., torch.Tensor],
    documents: Sequence[Sequence[int]],
    *,
    steps: int,
    lr: float,
    title: str,
) -> list[float]:
    """Trains in place, with a linear warm-up and decay; returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / steps)
    )
    batches, losses = _batches(documents, model.config.pad_token_id or 0), []
    with tqdm(range(steps), desc=title, unit="step") as progress:
        for _ in progress:
            value = loss(*next(batches))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(value.item())
            progress.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
    return losses


def _batches(documents: Sequence[Sequence[int]], pad_id: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless epochs of padded ids_BL (int64) and what of them is real (bool), in an order of its own, always the same.

    Documents of like length go together, so that little is padding.
    """
    generator = random.Random(0)
    while True:
        ordered = sorted(documents, key=lambda ids: len(ids) + generator.random() * 4)
        groups = list(_groups(ordered))
        generator.shuffle(groups)
        for group in groups:
            rows = [torch.tensor(ids) for ids in group]
            real = [torch.ones(len(ids), dtype=torch.bool) for ids in group]
            yield (
                nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id),
                nn.utils.rnn.pad_sequence(real, batch_first=True),
            )


def _groups(ordered: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Neighbours, at most BATCH_TOKENS tokens together once padded; documents come by rising length."""
    group: list[Sequence[int]] = []
    for ids in ordered:
        if group and (len(group) + 1) * len(ids) > BATCH_TOKENS:
            yield group
            group = []
        group.append(ids)
    yield group


def _write_jsonl(path: Path, texts: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def _once(path: Path, build: Callable[[Path], object]) -> None:
    """Builds a file or folder beside its place and moves it there once complete; does nothing if it is there."""
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            build(Path(folder) / path.name)
            (Path(folder) / path.name).rename(path)


if __name__ == "__main__":
    sys.exit(main())
