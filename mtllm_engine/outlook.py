"""What a run will take on GPUs that need not be there, as far as its files say, and what would be
faster or would fit. No weights are read, and nothing is fetched.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig

from mtllm_engine.config import Config, LoraConfig
from mtllm_engine.data.annotations import NO_ANNOTATIONS
from mtllm_engine.data.shards import Corpus, Manifest
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.languages import ENGLISH
from mtllm_engine.model import hub
from mtllm_engine.model.build import read_encoder, with_targets
from mtllm_engine.model.families import DecoderSpec, decoder_spec, read_config
from mtllm_engine.model.known import known_decoder, known_encoder
from mtllm_engine.model.peft import read_lora
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.tensors import resolve
from mtllm_engine.tasks import find_dataset, load_task
from mtllm_engine.training import cost, memory
from mtllm_engine.training.cost import Step, Texts
from mtllm_engine.training.gpus import Cluster
from mtllm_engine.training.memory import Models, Row
from mtllm_engine.training.traffic import Command

SAMPLE = 200  # documents of a corpus that are tokenised for their mean length
MOST_GPUS = 1024  # proposed for what does not fit on fewer
SAME = 1.01  # times the shortest step: not worth a change of settings

Settings = dict[str, Any]
"""Dotted keys and their values."""


class Layout(NamedTuple):
    """How weights lie on the GPUs."""

    name: str
    stage: Literal[0, 3]
    has_copies: bool = False

    @property
    def secondary(self) -> Literal["none", "node"]:
        """The value of `zero.secondary`."""
        return "node" if self.has_copies else "none"


WHOLE = Layout("whole", 0)
SHARDED = Layout("sharded", 3)
COPIED = Layout("a copy a node", 3, has_copies=True)
RECOMPUTE = ("cheap", "mlp", "layer")
"""Of memory.recompute, from the fastest to the smallest."""


class Estimate(NamedTuple):
    """A configuration on a cluster, in a layout."""

    config: Config
    layout: Layout
    rows: list[Row]
    step: Step

    @property
    def bytes(self) -> int:
        return memory.total(self.rows)

    @property
    def fits(self) -> bool:
        return self.bytes <= 1e9 * self.step.cluster.gpu.gbytes


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One run that is planned."""

    config: Config
    models: Models
    texts: Texts
    num_documents: int | None
    """Of its corpora; None: they are not at hand."""
    command: Command

    @property
    def num_steps(self) -> int | None:
        """None: epochs of corpora that are not at hand."""
        data, optim = self.config.data, self.config.optim
        if optim.steps or self.command != "train":
            return optim.steps
        if self.num_documents is None:
            return None
        return math.ceil(optim.epochs * self.num_documents / (data.lanes * data.pack_documents))

    def estimate(self, cluster: Cluster, layout: Layout, config: Config | None = None) -> Estimate:
        """Args: config: Another than its own, of the same models."""
        config = config or self.config
        zero = replace(config.zero, stage=layout.stage, secondary=layout.secondary)
        config = replace(config, zero=zero)
        copies = {"has_copies": layout.has_copies}
        work = cost.work_of(config, self.texts, cluster.size)
        node = cluster.gpus if layout.has_copies else 0
        rows = memory.rows(config, self.models, cluster.size, node_size=node)
        step = cost.predict(config, self.models, cluster, work, command=self.command, **copies)
        return Estimate(config, layout, rows, step)


def layouts_of(config: Config, cluster: Cluster) -> list[Layout]:
    """Those that differ there."""
    found = [WHOLE]
    if cluster.size > 1 or config.zero.stage == 3:
        found.append(SHARDED)
    return found + [COPIED] * (cluster.nodes > 1)


def chosen(config: Config, estimates: Sequence[Estimate]) -> Estimate:
    """The one that a run takes by its `zero.stage`: as `training.layout` decides."""
    sharded = [each for each in estimates if each.layout.stage == SHARDED.stage]
    asked = [each for each in sharded if each.layout.secondary == config.zero.secondary]
    sharded = asked or sharded
    if config.zero.stage == "auto":
        return estimates[0] if estimates[0].fits or not sharded else sharded[0]
    return sharded[0] if config.zero.stage == SHARDED.stage else estimates[0]


def with_lanes(config: Config, cluster: Cluster, notes: list[str]) -> Config:
    """At least a lane for each GPU."""
    lanes = config.data.lanes
    if lanes >= cluster.size:
        return config
    times = f"{cluster.size / lanes:.3g} x the documents"
    notes.append(
        f"data.lanes={lanes} are too few for {cluster.size} GPUs: reckoned with data.lanes="
        f"{cluster.size}, and a step has {times}; to learn as much, lower optim.steps as well"
    )
    return replace(config, data=replace(config.data, lanes=cluster.size))


def fastest(subject: Subject, cluster: Cluster) -> tuple[Settings, Estimate] | None:
    """Of all layouts, sizes of micro-batches and kinds of recomputation the fastest that fits, and
    what must be set for it; of about equally fast ones whole weights, which depend on no network,
    and what changes least. None: nothing fits."""
    found = []
    for size, kind in itertools.product(_sizes(subject.config, cluster), RECOMPUTE):
        options = replace(subject.config.memory, max_tokens=size, recompute=kind)
        config = replace(subject.config, memory=options)
        layouts = layouts_of(config, cluster)
        estimates = [subject.estimate(cluster, each, config) for each in layouts]
        usual = chosen(config, estimates)
        for each in filter(lambda each: each.fits, estimates):
            found.append((_settings(subject.config, each, usual.layout), each))
    if not found:
        return None
    limit = SAME * min(each.step.seconds for _, each in found)
    near = [pair for pair in found if pair[1].step.seconds <= limit]
    return min(near, key=lambda pair: (pair[1].layout.stage, len(pair[0]), pair[1].bytes))


def _settings(config: Config, estimate: Estimate, usual: Layout) -> Settings:
    """What an estimate has otherwise. Args: usual: The layout that it would have by itself."""
    memories = (vars(config.memory), vars(estimate.config.memory))
    changed = {key: memories[1][key] for key, value in memories[0].items()}
    settings: Settings = {
        f"memory.{key}": value for key, value in changed.items() if memories[0][key] != value
    }
    if estimate.layout.stage != usual.stage:
        settings["zero.stage"] = estimate.layout.stage
    if estimate.layout.secondary != config.zero.secondary:
        settings["zero.secondary"] = estimate.layout.secondary
    return settings


def _sizes(config: Config, cluster: Cluster) -> list[int]:
    """Micro-batches of 1, 2, 4, ... packs, up to a rank's, and the one that is asked for."""
    pack = config.data.pack_tokens or config.data.pack_documents * config.data.max_length
    packs = math.ceil(config.data.lanes / cluster.size)
    counts = [1 << power for power in range(packs.bit_length()) if 1 << power < packs]
    return sorted({config.memory.max_tokens, *(count * pack for count in [*counts, packs])})


def smallest_change(subject: Subject, cluster: Cluster, layout: Layout) -> Settings | None:
    """What makes a run fit that does not: as few settings as possible, of these rather the first:
    recomputation, smaller micro-batches, smaller packs, sharding, quantisation, more GPUs ("gpus").
    """
    options = _changes(subject.config, cluster, layout)
    tried = [
        {key: value for each in values for key, value in each.items()}
        for count in range(1, len(options) + 1)
        for several in itertools.combinations(options, count)
        for values in itertools.product(*several)
    ]
    fits = (each for each in sorted(tried, key=len) if _fits(subject, cluster, layout, each))
    return next(fits, None)


def _changes(config: Config, cluster: Cluster, layout: Layout) -> list[list[Settings]]:
    """The values of each change, the smallest first."""
    data, pack = config.data, config.data.pack_tokens
    forms = ["fp8"] * bool(cluster.gpu.fp8_tflops) + ["nf4"]
    again = RECOMPUTE[RECOMPUTE.index(config.memory.recompute) + 1 :]
    sizes = [each for each in _sizes(config, cluster) if each < config.memory.max_tokens]
    smaller = [pack >> power for power in (1, 2, 3) if pack >> power >= data.max_length]
    counts = [cluster.size << power for power in range(1, 11)]
    changes = [
        [{"memory.recompute": kind} for kind in again],
        [{"memory.max_tokens": size} for size in reversed(sizes)],
        [
            {"data.pack_tokens": size, "data.lanes": data.lanes * pack // size}
            | {"memory.max_tokens": size}
            for size in smaller
        ],
        [{"zero.stage": 3}] * (layout.stage == 0 and cluster.size > 1),
        [{"model.quantization": form} for form in forms if config.model.quantization == "none"],
        [{"gpus": count, "zero.stage": 3} for count in counts if count <= MOST_GPUS],
    ]
    return [each for each in changes if each]


def _fits(subject: Subject, cluster: Cluster, layout: Layout, settings: Settings) -> bool:
    config, size = subject.config, settings.get("gpus", cluster.size)
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if name:
            config = replace(
                config, **{section: replace(getattr(config, section), **{name: value})}
            )
    stage = settings.get("zero.stage", layout.stage)
    config = replace(config, zero=replace(config.zero, stage=stage))
    data = replace(config.data, lanes=max(size, config.data.lanes))
    rows = memory.rows(replace(config, data=data), subject.models, size)
    return memory.total(rows) <= 1e9 * cluster.gpu.gbytes


# What is planned.


def examine(
    config: Config,
    notes: list[str],
    *,
    command: Command = "train",
    made: Sequence[Config] = (),
) -> Subject:
    """A run's models, texts and lengths, as far as they are at hand; what is not is noted.

    Args:
        made: The recipe's other runs, whose adapters this one may start from.

    Raises:
        ValueError: A model is neither at hand nor known.
    """
    encoder = _encoder(config.model.encoder, notes)
    decoder = _decoder(config.model.decoder, notes)
    config = with_targets(_with_rank(config, made), decoder, config.model.decoder)
    # Whichever attention runs: the sizes are the same, and a laptop need not have it.
    model = replace(config.model, attention="reference")
    with torch.device("meta"):
        stack = Stack(
            replace(config, model=model),
            encoder,
            decoder,
            teacher=LoraConfig(target_modules=decoder.targets) if model.teacher else None,
        )
    texts, num_documents = _texts(config, notes)
    models = Models(encoder=encoder, decoder=decoder, stack=stack)
    options = {"texts": texts, "num_documents": num_documents, "command": command}
    return Subject(config=config, models=models, **options)


def _at_hand(name: str) -> Path | None:
    """A model's folder, or what was fetched of a hub id earlier."""
    if Path(name).exists():
        return resolve(name)
    try:
        folder = hub.cached(name)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _encoder(name: str, notes: list[str]) -> PreTrainedConfig:
    if folder := _at_hand(name):
        return read_encoder(folder)
    return _known("model.encoder", name, known_encoder(name), notes)


def _decoder(name: str, notes: list[str]) -> DecoderSpec:
    key = "model.decoder"
    if folder := _at_hand(name):
        return decoder_spec(read_config(folder, key), f"{key}: {folder}")
    return decoder_spec(_known(key, name, known_decoder(name), notes))


def _known(
    key: str, name: str, found: tuple[str, PreTrainedConfig] | None, notes: list[str]
) -> PreTrainedConfig:
    if found is None:
        fix = "name a folder with its config.json, or fetch that by `hf download`"
        raise ValueError(f"{key}: {name} is not here, and no model whose shape is known; {fix}")
    notes.append(f"{key} is not here: taken to be as large as {found[0]}, by its name")
    return found[1]


def _with_rank(config: Config, made: Sequence[Config]) -> Config:
    """The configuration of a sum, which leaves its rank open, with the parts' ranks added up."""
    lora = config.lora
    if lora.rank:
        return config
    ranks = [_rank_of(path, made) for path in config.model.init_from]
    targets = lora.target_modules or LoraConfig().target_modules
    lora = replace(lora, rank=sum(ranks), alpha=lora.alpha or 1.0, target_modules=targets)
    return replace(config, lora=lora)


def _rank_of(path: str, made: Sequence[Config]) -> int:
    for other in made:
        if Path(path).is_relative_to(other.run.dir):
            return other.lora.rank
    return read_lora(Path(path)).rank if Path(path).exists() else LoraConfig().rank


def _texts(config: Config, notes: list[str]) -> tuple[Texts, int | None]:
    """Mean lengths and the number of documents of a run's corpora."""
    longest = float(config.data.max_length)
    unknown = Texts(longest, longest, is_known=False)
    try:
        tokenizer = _tokenizer(config)
        sources = [*_task_texts(config), *_corpora(config)] or [*_test_texts(config)]
        if not sources:
            raise ValueError("no corpus is named")
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split())
        notes.append(f"{said}: texts are taken to be as long as data.max_length, an upper bound")
        return unknown, _count(config)
    counts = [count for count, _, _ in sources]
    weights = config.data.mixture if len(config.data.mixture) == len(counts) else counts
    means = [_mean(tokenizer, texts, language) for _, texts, language in sources]
    student, teacher = (
        sum(weight * mean[side] for weight, mean in zip(weights, means)) / sum(weights)
        for side in (0, 1)
    )
    sampled = f"{student:.0f} and {teacher:.0f} tokens on average, of {SAMPLE} documents or fewer"
    notes.append(f"texts: {sampled} of each corpus")
    return Texts(student, teacher), sum(counts)


def _tokenizer(config: Config) -> PairTokenizer:
    folders = [_at_hand(name) for name in (config.model.encoder, config.model.decoder)]
    if None in folders:
        raise ValueError("corpora or tokenizers are not here")
    return PairTokenizer(
        *folders,
        max_length=config.data.max_length,
        truncation=config.data.truncation,
        parts=config.data.parts,
        encoder_prefix=config.model.encoder_prefix,
    )


def _task_texts(config: Config) -> Iterator[tuple[int, list[str], str]]:
    """Number, some texts and the language of a task's training examples, if it has any."""
    if config.task.train:
        dataset, folder = find_dataset(load_task(config.task.name), config.task.train)
        texts = [each.text for each in dataset.read(folder, "train", ENGLISH)]
        yield len(texts), texts[:: max(1, len(texts) // SAMPLE)], ENGLISH


def _test_texts(config: Config) -> Iterator[tuple[int, list[str], str]]:
    """Of test sets, in English: what evaluation alone reads."""
    for source in config.task.test:
        dataset, folder = find_dataset(load_task(config.task.name), source)
        texts = [each.text for each in dataset.read(folder, "test", ENGLISH)]
        yield len(texts), texts[:: max(1, len(texts) // SAMPLE)], ENGLISH


def _corpora(config: Config) -> Iterator[tuple[int, list[str], str]]:
    for name in config.data.train:
        manifest = Manifest.load(name)
        corpus = Corpus(name)
        shard = max(range(len(manifest.shards)), key=lambda each: manifest.shards[each].samples)
        number = manifest.shards[shard].samples
        picked = range(0, number, max(1, number // SAMPLE))
        texts = [corpus.read(shard, index).text for index in picked]
        corpus.close()
        yield manifest.samples, texts, manifest.language


def _mean(tokenizer: PairTokenizer, texts: Sequence[str], language: str) -> tuple[float, float]:
    """Mean tokens of the student's and of the teacher's side."""
    both = [tokenizer.example(text, language, NO_ANNOTATIONS) for text in texts]
    student, teacher = ([len(each[side].ids_S) for each in both] for side in (0, 1))
    return sum(student) / len(both), sum(teacher) / len(both)


def _count(config: Config) -> int | None:
    """Documents, where their lengths are not known."""
    try:
        counts = [count for count, _, _ in _task_texts(config)]
        return sum(counts) + sum(Manifest.load(name).samples for name in config.data.train)
    except (ValueError, OSError):
        return None
