"""The self-contained folder: both models, what was trained beside them, and code that needs only
transformers, or sentence-transformers.
"""

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mtllm_engine.config import Config
from mtllm_engine.data import parts, pieces
from mtllm_engine.data.vocabulary import read_languages
from mtllm_engine.export import Options, card, seal
from mtllm_engine.export.models import (
    copy_tokenizer,
    llm_dtype,
    llm_tensors,
    read_json,
    write_checkpoint,
    write_config,
    write_encoder,
    write_json,
)
from mtllm_engine.export.streaming import write_safetensors
from mtllm_engine.inference import MTLLM
from mtllm_engine.languages import ENGLISH, NAMES, SCRIPTS
from mtllm_engine.model.tensors import resolve
from mtllm_engine.model.weights import ADAPTERS, HEAD_FILE, PROJECTION_FILE, RUN_FILES
from mtllm_engine.training.checkpoint import READS, chain_of, fingerprint_of
from mtllm_engine.training.trained import (
    ENCODER,
    EXPORTED,
    LLM,
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
CODE += [Path(parts.__file__), Path(pieces.__file__)]
HEAD = ("kind", "num_outputs", "labels")
SENTENCES = 100
"""How many a merged model is looked at with."""


def write(trained: Trained, draft: Path, options: Options) -> None:
    """Fills the folder; `find_trained` reads it.

    Raises:
        ValueError: A value is not finite.
    """
    teacher = trained.config.model.teacher
    is_merged = options.merge or trained.is_merged
    write_encoder(trained, draft / ENCODER, options.dtype)
    _write_llm(trained, draft / LLM, options)
    # What was trained beside them.
    kept = (PROJECTION_FILE, HEAD_FILE) if is_merged else RUN_FILES
    write_checkpoint(trained, trained.student, draft / STUDENT, kept)
    beside = {TEACHER: Path(teacher)} if teacher and not is_merged else {}
    beside |= {f"{TASKS}/{task}": folder for task, folder in options.tasks.items()}
    for place, checkpoint in beside.items():
        write_checkpoint(trained, checkpoint, draft / place, (ADAPTERS, HEAD_FILE))
    # What says how it is read, and what it is.
    settings = _settings(trained, options, is_merged=is_merged)
    write_json(draft / "config.json", settings)
    for name, content in SENTENCE_TRANSFORMERS.items():
        write_json(draft / name, content)
    for path in CODE:
        shutil.copyfile(path, draft / path.name)
    record = _record(trained, options, settings)
    if options.merge:
        seal(draft, EXPORTED, record)
        record["about"]["moved"] = _moved(trained, draft, settings["dtype"])
    (draft / "README.md").write_text(card.written(record["about"], settings), "utf-8")
    seal(draft, EXPORTED, record)


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


def _write_llm(trained: Trained, folder: Path, options: Options) -> None:
    """An ordinary folder of the LLM as it was, its head for words too, but for how it attends."""
    source = resolve(trained.config.model.decoder)
    tensors = llm_tensors(trained, options.dtype, merge=options.merge)
    write_safetensors(folder / "model.safetensors", tensors)
    sight = {} if trained.config.model.causal else {"is_causal": False}
    write_config(source, folder, llm_dtype(trained, options.dtype), **sight)
    copy_tokenizer(source, folder)
    if (generation := source / "generation_config.json").is_file():
        write_json(folder / generation.name, read_json(generation))


def _settings(trained: Trained, options: Options, *, is_merged: bool) -> dict[str, Any]:
    """config.json, as modeling_mtllm.py's `MTLLMConfig` reads it."""
    config = trained.config
    model, data = config.model, config.data
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
        **languages_of(config),
        "default_language": default,
        "teacher": "" if is_merged else TEACHER if model.teacher else LLM,
        "merged": is_merged,
        "tasks": {task: asdict(head) | {"folder": at} for task, (head, at) in heads.items()},
    }


def languages_of(config: Config) -> dict[str, Any]:
    """What config.json says of how the encoder reads texts in a language."""
    known = read_languages(resolve(config.model.encoder))
    return {
        "encoder_prefix": config.model.encoder_prefix,
        "languages": sorted(known.codes) if known.is_told or known.trained else [],
        "language_tokens": dict(sorted(known.tokens.items())),
        "language_last": known.is_last,
        "fallback": dict(config.languages.fallback) if known.is_told else {},
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
            "model.adapters": chain_of(config.model.adapters),
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
