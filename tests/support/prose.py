"""Something to learn: English prose that comes with Python, and two tiny models that learned it.

Random models have nothing to distil, so both are trained: the encoder to fill in masked tokens, the
LLM to predict the next token, each with its own vocabulary. What is written are ordinary Hugging
Face checkpoints: an M2M-100 in the shape of NLLB with an NllbTokenizer, and a Llama with a
byte-level BPE.
"""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional
from transformers import M2M100ForConditionalGeneration
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES
from transformers.utils.logging import disable_progress_bar

from mtllm_engine.babel.models import (
    build_llm,
    encode,
    nllb_config,
    token_batches,
    train,
    train_nllb_tokenizer,
)
from mtllm_engine.config import load
from mtllm_engine.data.sources import pack
from mtllm_engine.training.log import print_table
from mtllm_engine.training.report import summary
from mtllm_engine.world import device_type

LANGUAGE = "eng_Latn"
# Characters: what a document needs at least, and where the next one starts.
SHORTEST, LONG_ENOUGH = 80, 240
MASKED = 0.25
NOT_PROSE = re.compile(r">>>|::=|\.\. [a-z-]+::|[=\-*+~^#|]{4,}")
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[\"'(]?[A-Z])")
SKIPPED_PACKAGES = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "encodings",
}


def main(arguments: Sequence[str]) -> int:
    """Texts, models, shards, distillation on two ranks, result.

    Args:
        arguments: CONFIG, then section.key=value.
    """
    if device_type() == "cpu":
        # Else a warning, from where transformers looks for DeepSpeed.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        config = load(arguments[0], arguments[1:])
        folder = Path(config.model.encoder).parent
        write_prose(folder)
        corpora = {"train": config.data.train[0], "validation": config.validation.corpus}
        for source, corpus in corpora.items():
            if not (Path(corpus) / "manifest.json").is_file():
                options = {"language": LANGUAGE, "shards": 4, "licence": "PSF-2.0"}
                pack([folder / f"{source}.jsonl"], corpus, **options)
    except (ValueError, OSError) as error:
        print("mtllm: error:", error, file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "mtllm_engine.cli", "train", *arguments, "--gpus", "2"]
    if status := subprocess.run(command).returncode:
        return status
    run = Path(config.run.dir)
    print()
    files = {"curve": str(run / "curve.png"), "report": str(run / "report.html")}
    print_table(summary(run) | files)
    return 0


def collect_prose() -> list[str]:
    """English documents of one line each, from Python's own documentation: no duplicates, always in
    one order.
    """
    documents: dict[str, str] = {}
    for text in [*_help_topics(), *_docstrings(Path(sysconfig.get_path("stdlib")))]:
        for document in _documents(text):
            documents.setdefault(_fingerprint(document), document)
    return list(documents.values())


def split_prose(texts: Iterable[str], held_out: float = 0.1) -> tuple[list[str], list[str]]:
    """Training and held-out documents: a document's own hash decides, so the split survives any
    change of the others.

    Args:
        texts: Documents; of those that start alike (see `_fingerprint`) only the first is kept.
        held_out: The share held out, from 0 to 1.
    """
    training, validation = [], []
    for key, text in {_fingerprint(text): text for text in reversed(list(texts))}.items():
        share = int(key, 16) / 16 ** len(key)
        (validation if share < held_out else training).append(text)
    return training[::-1], validation[::-1]


def write_prose(
    folder: Path,
    *,
    encoder_steps: int = 300,
    decoder_steps: int = 300,
    vocab_size: int = 1000,
    seed: int = 0,
) -> None:
    """Writes `train.jsonl`, `validation.jsonl` (one {"text": ...} a line), `encoder/` and
    `decoder/`.

    What exists is complete, because it got its name last, and is left alone. Both models see the
    training text only.
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
    _once(
        folder / "encoder",
        lambda path: build_encoder(path, training, steps=encoder_steps, **options),
    )
    _once(
        folder / "decoder",
        lambda path: build_llm(path, training, steps=decoder_steps, **options),
    )


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

    Only the encoder learns, from masked tokens. The decoder that the architecture asks for stays
    random.
    """
    tokenizer = train_nllb_tokenizer(texts, vocab_size, FAIRSEQ_LANGUAGE_CODES, LANGUAGE)
    torch.manual_seed(seed)
    model = M2M100ForConditionalGeneration(nllb_config(len(tokenizer), width, layers, 1))
    loss = _masked_token_loss(model, tokenizer.mask_token_id)
    batches = token_batches(encode(tokenizer, texts), tokenizer.pad_token_id)
    losses = train(model, loss, batches, steps=steps, lr=lr)
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
                if isinstance(
                    node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                ):
                    yield ast.get_docstring(node) or ""


def _documents(text: str) -> Iterator[str]:
    """A text's sentences, joined to documents of useful length; what is no prose ends the document
    before it.
    """
    document = ""
    for paragraph in [*re.split(r"\n\s*\n", text), ""]:
        sentences = (
            SENTENCE_END.split(" ".join(paragraph.split())) if _is_prose(paragraph) else [""]
        )
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
    """A hash of the first letters, case and spacing aside, so that copies with another ending count
    as the same.
    """
    letters = re.sub(r"[^a-z]", "", text.lower())[:60]
    return hashlib.sha256(letters.encode()).hexdigest()[:16]


def _masked_token_loss(
    model: M2M100ForConditionalGeneration, mask_id: int
) -> Callable[..., torch.Tensor]:
    def loss(ids_BL: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
        # Neither language token nor </s>: those are no puzzle.
        inner_BL = real_BL & real_BL.roll(-1, 1)
        inner_BL[:, 0] = False
        masked_BL = inner_BL & (torch.rand(ids_BL.shape) < MASKED)
        hidden_BLE = model.model.encoder(
            ids_BL.masked_fill(masked_BL, mask_id), real_BL
        ).last_hidden_state
        # Visible tokens are asked for too: otherwise what is learned first is one state for all,
        # the words' frequency.
        return functional.cross_entropy(model.lm_head(hidden_BLE[inner_BL]), ids_BL[inner_BL])

    return loss


def _write_jsonl(path: Path, texts: Iterable[str]) -> None:
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        encoding="utf-8",
    )


def _once(path: Path, build: Callable[[Path], object]) -> None:
    """Builds a file or folder beside its place and moves it there once complete; does nothing if it
    is there.
    """
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            build(Path(folder) / path.name)
            (Path(folder) / path.name).rename(path)
