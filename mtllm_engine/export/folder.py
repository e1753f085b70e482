"""The self-contained folder: both models, what was trained beside them, and code that needs only
transformers, or sentence-transformers.
"""

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtllm_engine.data import parts
from mtllm_engine.data.tokenizers import language_tokens, load_tokenizer
from mtllm_engine.export import Options, card, seal
from mtllm_engine.export.streaming import Planned, merged, planned, write_safetensors
from mtllm_engine.inference import MTLLM
from mtllm_engine.languages import ENGLISH, NAMES, SCRIPTS, codes_of
from mtllm_engine.model import peft
from mtllm_engine.model.licences import public_name
from mtllm_engine.model.weights import (
    ADAPTERS,
    HEAD_FILE,
    PROJECTION_FILE,
    TensorFiles,
    checkpoint_tensors,
    file_of,
    resolve,
    tokenizer_files,
)
from mtllm_engine.training.checkpoint import fingerprint_of
from mtllm_engine.training.trained import (
    ENCODER,
    EXPORTED,
    LLM,
    READS,
    STUDENT,
    TASKS,
    TEACHER,
    Head,
    Trained,
    head_of,
    task_of,
)

HERE = Path(__file__).parent
CODE = [HERE / f"{name}_mtllm.py" for name in ("modeling", "texts", "sentences")]
CODE += [Path(parts.__file__)]
EMBEDDINGS = ("model.encoder.embed_tokens", "encoder.embed_tokens", "embed_tokens")
EMBEDDINGS += ("model.shared", "shared")
HEAD = ("kind", "num_outputs", "labels")
PLACES = ("_name_or_path", "name_or_path")
SENTENCES = 100
"""How many a merged model is looked at with."""


def write(trained: Trained, draft: Path, options: Options) -> None:
    """Fills the folder; `find_trained` reads it.

    Raises:
        ValueError: A value is not finite.
    """
    model = trained.config.model
    is_merged = options.merge or trained.is_merged
    dtype = getattr(torch, options.dtype) if options.dtype else None
    # The two models.
    encoder, llm = resolve(model.encoder), resolve(model.decoder)
    tensors = list(_encoder_tensors(encoder, dtype))
    _write_model(encoder, draft / ENCODER, tensors, options, architectures=["M2M100Encoder"])
    tensors = list(_llm_tensors(llm, dtype, trained.student if options.merge else None))
    _write_model(llm, draft / LLM, tensors, options, **({} if model.causal else BIDIRECTIONAL))
    # What was trained beside them.
    base = public_name(model.decoder)
    kept = (PROJECTION_FILE, HEAD_FILE, *([] if is_merged else [ADAPTERS]))
    causal = model.causal
    write_checkpoint(trained.student, draft / STUDENT, base, kept, causal=causal)
    if model.teacher and not is_merged:
        write_checkpoint(Path(model.teacher), draft / TEACHER, base, causal=causal)
    for task, folder in options.tasks.items():
        write_checkpoint(folder, draft / TASKS / task, base, causal=causal)
    # What says how it is read, and what it is.
    settings = _settings(trained, options, is_merged=is_merged)
    _write_json(draft / "config.json", settings)
    for name, content in SENTENCE_TRANSFORMERS.items():
        _write_json(draft / name, content)
    for path in CODE:
        shutil.copyfile(path, draft / path.name)
    record = _record(trained, options, settings)
    if options.merge:
        seal(draft, EXPORTED, record)
        record["about"]["moved"] = _moved(trained, draft, settings["dtype"])
    (draft / "README.md").write_text(card.written(record["about"], settings), "utf-8")
    seal(draft, EXPORTED, record)


BIDIRECTIONAL = {"is_causal": False}
SENTENCE_TRANSFORMERS: dict[str, Any] = {
    "modules.json": [
        {
            "idx": 0,
            "name": "0",
            "path": "",
            "type": "sentences_mtllm.MTLLMSentences",
            "kwargs": ["language"],
        }
    ],
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}


def write_checkpoint(
    source: Path,
    out: Path,
    base: str,
    kept: tuple[str, ...] = (ADAPTERS, HEAD_FILE),
    *,
    causal: bool,
) -> None:
    """A checkpoint's tensors in fp32, by our own names.

    Args:
        base: What the LLM is called.
        kept: Files that are taken of it, where it has them.
    """
    tensors = checkpoint_tensors(source)
    for file in kept:
        names = [name for name in tensors.names if file_of(name) == file]
        if names:
            plans = [planned(tensors, name, dtype=torch.float32) for name in names]
            write_safetensors(out / file, plans)
    if (out / ADAPTERS).is_file():
        about = peft.peft_config(peft.read_lora(source), base, causal=causal)
        _write_json(out / peft.FILE, about)


def _encoder_tensors(folder: Path, dtype: torch.dtype | None) -> Iterator[Planned]:
    """Of transformers' `M2M100Encoder`, whatever was around it."""
    tensors = TensorFiles(folder)
    embedding = next(name for each in EMBEDDINGS if (name := f"{each}.weight") in tensors.names)
    yield planned(tensors, embedding, dtype=dtype, to="embed_tokens.weight")
    for name in tensors.names:
        own = name.removeprefix("model.").removeprefix("encoder.")
        if own.startswith(("layers.", "layer_norm.")):
            yield planned(tensors, name, dtype=dtype, to=own)


def _llm_tensors(
    folder: Path, dtype: torch.dtype | None, student: Path | None
) -> Iterator[Planned]:
    """All that there are. Args: student: whose adapters go into them."""
    tensors = TensorFiles(folder)
    adapters = checkpoint_tensors(student) if student else None
    lora = peft.read_lora(student) if student else None
    for name in tensors.names:
        plan = planned(tensors, name, dtype=dtype)
        saved = f"base_model.model.{name.removeprefix('model.').removesuffix('.weight')}"
        if adapters and lora and f"{saved}.lora_A.weight" in adapters.names:
            plan = merged(plan, adapters, saved, lora)
        yield plan


def _write_model(
    source: Path, out: Path, tensors: list[Planned], options: Options, **changes: Any
) -> None:
    """Weights, configuration and tokenizer of a model."""
    write_safetensors(out / "model.safetensors", tensors)
    config = _read_json(source / "config.json")
    if options.dtype:
        config.pop("torch_dtype", None)
        changes["dtype"] = options.dtype
    _write_json(out / "config.json", config | changes)
    for path in (*tokenizer_files(source), source / "generation_config.json"):
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    # A text is a text: a control token that is spelled in it is its characters.
    path = out / "tokenizer_config.json"
    _write_json(path, _read_json(path) | {"split_special_tokens": True})


def _settings(trained: Trained, options: Options, *, is_merged: bool) -> dict[str, Any]:
    """config.json, as modeling_mtllm.py's `MTLLMConfig` reads it."""
    config = trained.config
    model, data = config.model, config.data
    tokens = language_tokens(load_tokenizer(resolve(model.encoder)))
    default = options.default_language or trained.record.get("default_language", "")
    own = {trained.task or "task": trained.head} if trained.head else {}
    heads = {task: (head, STUDENT) for task, head in own.items()}
    for task, folder in options.tasks.items():
        heads[task] = (_head(trained, task, folder), f"{TASKS}/{task}")
    return {
        "model_type": "mtllm",
        "architectures": ["MTLLMModel"],
        "auto_map": {
            "AutoConfig": "modeling_mtllm.MTLLMConfig",
            "AutoModel": "modeling_mtllm.MTLLMModel",
        },
        "causal": model.causal,
        "projection_bias": model.projection_bias,
        "max_length": data.max_length,
        "truncation": data.truncation,
        "parts": data.parts,
        "dtype": options.dtype or model.dtype,
        "languages": codes_of(tokens),
        "fallback": dict(config.languages.fallback),
        "default_language": default,
        "teacher": "" if is_merged else TEACHER if model.teacher else LLM,
        "merged": is_merged,
        "tasks": {task: asdict(head) | {"folder": at} for task, (head, at) in heads.items()},
    }


def _head(trained: Trained, task: str, folder: Path) -> Head:
    labels = trained.record["tasks"][task]["labels"] if task in trained.tasks else ()
    head = head_of(folder, task_of(folder) or task, labels)
    assert head, f"{folder} has been found to have one"
    return head


def _record(trained: Trained, options: Options, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `find_trained` reads of the folder."""
    config = trained.config
    reads = {}
    for key in READS:
        section, _, field = key.partition(".")
        reads[key] = getattr(getattr(config, section), field)
    identity = trained.record.get("identity") if trained.is_exported else None
    own = next((task for task, at in settings["tasks"].items() if at["folder"] == STUDENT), "")
    return {
        "reads": reads | {"model.dtype": settings["dtype"]},
        "default_language": settings["default_language"],
        "task": own,
        "tasks": {
            task: {key: head[key] for key in HEAD} for task, head in settings["tasks"].items()
        },
        "identity": identity
        or {
            "model.causal": config.model.causal,
            "model.encoder": fingerprint_of(config.model.encoder),
            "model.decoder": fingerprint_of(config.model.decoder),
        },
        "about": card.about(trained),
    }


def _moved(trained: Trained, draft: Path, dtype: Any) -> dict[str, float]:
    """How far vectors of sentences moved when the adapters were merged, as shares of their length:
    the mean and the largest.
    """
    sentences = [
        f"{name} is written in the {SCRIPTS[code[4:]]} script."
        for code, name in itertools.islice(NAMES.items(), SENTENCES)
    ]
    model = trained.config.model
    models = {} if trained.is_exported else {"encoder": model.encoder, "decoder": model.decoder}
    vectors = []
    for name, options in ((trained.name, models), (draft, {})):
        model = MTLLM.from_pretrained(name, dtype=dtype, quantization="none", **options)
        language = ENGLISH if ENGLISH in model.languages else model.languages[0]
        vectors.append(model.encode(sentences, language, progress=False))
        del model
    before_ND, after_ND = vectors
    lengths_N = np.linalg.norm(before_ND, axis=1)
    moved_N = np.linalg.norm(after_ND - before_ND, axis=1) / lengths_N
    return {"mean": float(moved_N.mean()), "largest": float(moved_N.max())}


def _read_json(path: Path) -> dict[str, Any]:
    """Without what says where the model lay, which is nobody's business."""
    said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {key: value for key, value in said.items() if key not in PLACES}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
