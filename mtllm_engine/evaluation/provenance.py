"""What made predictions, and which of a folder's belong into one table.

A `maker` stands in every file of predictions:

    checkpoint  a digest of what was trained, of each system and seed
    settings    all else that answers depend on, of each system: models, lengths, the translator
    test        a digest of the examples, of each data set and language
    commit      of our code; another one is told, and mixes
    evaluated   when, the same for all that one evaluation made
"""

import datetime
import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtllm_engine.config import Config, flatten
from mtllm_engine.evaluation.predictions import Predictions
from mtllm_engine.evaluation.systems import Kind
from mtllm_engine.files import sha256_of
from mtllm_engine.languages import ENGLISH
from mtllm_engine.model.merge import chain_fingerprint
from mtllm_engine.model.tensors import fingerprint, resolve, tokenizer_files
from mtllm_engine.model.weights import RUN_FILES
from mtllm_engine.tasks import digest_now, load_task
from mtllm_engine.training.log import commit

SETTINGS = ("model.causal", "model.dtype", "model.quantization")
SETTINGS += ("data.max_length", "data.truncation")
EARLIER = {"model.adapters": ""}
"""What settings are of predictions that do not say."""
OF_STACK = {"data.parts": "whole", "model.encoder_prefix": ""}
"""Settings of the stack alone, and what they are of predictions that do not say."""
OF_TRANSLATION = {"evaluate.translate_by": "lines"}
"""The same for translate-test."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Predictions that something else made than what was evaluated last, and so in no table."""

    system: str
    seed: int
    dataset: str
    languages: tuple[str, ...]
    differs: str
    """What was another one."""

    def __str__(self) -> str:
        where = f"{self.dataset} in {', '.join(self.languages)}"
        reason = f"made with another {self.differs} than what was evaluated last"
        return f"{self.system}, seed {self.seed}, {where}: left out, {reason}; evaluate it again"


def makers(
    config: Config, readers: Mapping[str, tuple[Kind, Sequence[str]]]
) -> dict[str, dict[str, Any]]:
    """The maker of what each system says, but for the test set; reads every byte of the models.

    Args:
        readers: Of each system who reads, and the checkpoints that made it.
    """
    flat, model = flatten(config), config.model
    digest_of_model = functools.cache(lambda name: fingerprint(resolve(name)))
    about = {
        "commit": commit() or "unknown",
        "evaluated": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
    }
    made: dict[str, dict[str, Any]] = {}
    chain = chain_fingerprint(model.adapters)
    for system, (kind, checkpoints) in readers.items():
        names = {} if kind == "encoder" else {"model.decoder": model.decoder}
        names |= {"model.encoder": model.encoder} if kind != "llm" else {}
        models = {key: digest_of_model(name) for key, name in names.items()}
        if kind == "encoder":  # where its texts are cut depends on the LLM's tokenizer, too
            paths = tokenizer_files(resolve(model.decoder))
            models["tokenizer of model.decoder"] = _digest_of(paths)
        else:
            models["model.adapters"] = chain
        keys = (*SETTINGS, *(OF_STACK if kind != "llm" else ()))
        keys += (*OF_TRANSLATION,) if system == "translate_test" else ()
        files = (*RUN_FILES, "adapter_config.json")
        trained = [_digest_of(_matching(Path(each), files)) for each in checkpoints]
        if kind == "encoder":  # its head follows from them
            trained = [_digest_of_english(config)]
        made[system] = about | {
            "checkpoint": " + ".join(trained),
            "settings": {key: flat[key] for key in keys} | models,
        }
    return made


def sort_out(predictions: Sequence[Predictions]) -> tuple[list[Predictions], list[LeftOut]]:
    """Those that belong together, in their order, and those that do not: the newest say what does.

    A system has one checkpoint for each seed and the same settings for all, a data set's language
    the same examples for all systems. What does not say what made it fits its like alone.
    """
    reference: dict[tuple, Any] = {}
    kept, left = set(), defaultdict(list)
    newest_first = sorted(
        predictions, key=lambda item: (item.maker or {}).get("evaluated", ""), reverse=True
    )
    for item in newest_first:
        marks = dict(_marks(item))
        differs = [mark[0] for mark, value in marks.items() if reference.get(mark, value) != value]
        if differs:
            what = ", ".join(differs) if item.maker else "maker (they do not say which)"
            left[item.system, item.seed, item.dataset, what].append(item.language)
            continue
        reference |= marks
        kept.add(item.identity)
    names = ("system", "seed", "dataset", "differs")
    parts = [
        LeftOut(**dict(zip(names, about)), languages=tuple(sorted(languages)))
        for about, languages in sorted(left.items())
    ]
    return [item for item in predictions if item.identity in kept], parts


def is_same(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    """Whether what made predictions would make the same again: our code, as committed, too."""
    is_known = now["commit"] != "unknown" and not now["commit"].endswith("+")
    when = {"evaluated": now["evaluated"]}
    return is_known and before is not None and {**before, **when} == now


def commits(predictions: Sequence[Predictions]) -> dict[str, list[str]]:
    """The commits of our code that made predictions, and the systems and seeds of each."""
    makers: dict[str, set[str]] = defaultdict(set)
    for item in predictions:
        if item.maker:
            makers[str(item.maker["commit"])].add(f"{item.system}, seed {item.seed}")
    return {each: sorted(systems) for each, systems in sorted(makers.items())}


def _marks(item: Predictions) -> Iterator[tuple[tuple, Any]]:
    """(what, of which) -> what it must be to belong with others of the same key."""
    maker: Mapping[str, Any] = item.maker or {}
    system, place = (item.system,), (item.dataset, item.language)
    yield ("checkpoint", *system, item.seed), maker.get("checkpoint")
    settings = maker.get("settings", {})
    settings = EARLIER | settings if item.maker else settings
    settings = OF_STACK | settings if "model.encoder" in settings else settings
    settings = OF_TRANSLATION | settings if "translator" in settings else settings
    for key, value in sorted(settings.items()):
        yield (key, *system), value
    yield ("set of settings", *system), sorted(settings)
    yield ("languages.fallback", *system, *place), item.language_given
    if item.maker:
        yield ("text of the test files", *place), maker["test"]


def _digest_of_english(config: Config) -> str:
    """Of the English examples of a task."""
    task, given = load_task(config.task.name), (config.task.train, config.task.validation)
    splits = [(split, source) for split, source in zip(("train", "validation"), given) if source]
    digests = [digest_now(task, source, split, ENGLISH) for split, source in splits]
    return " + ".join(map(str, digests))


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _digest_of(paths: Sequence[Path]) -> str:
    content = [(path.name, sha256_of(path)) for path in paths]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
