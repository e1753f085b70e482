"""Who answers which test sets: the LLM, alone or after translation, the encoder alone, the stack
after stage 2 or as a sum of adapters; and their cost."""

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from mtllm_engine import config as configs
from mtllm_engine.config import Config
from mtllm_engine.data.batch import Batch, Document, Totals
from mtllm_engine.data.encoder_languages import EncoderLanguages, Resolved
from mtllm_engine.data.stream import build_stream, each_step
from mtllm_engine.data.teacher_states import cost_of, folder_of
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.data.vocabulary import read_languages
from mtllm_engine.evaluation.predictions import Predictions
from mtllm_engine.evaluation.translate import Translator, find_model, translate_examples
from mtllm_engine.languages import ENGLISH, is_well_formed, nearest
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.model.objective import Outputs
from mtllm_engine.model.peft import read_lora
from mtllm_engine.model.sums import sum_of
from mtllm_engine.model.tensors import resolve
from mtllm_engine.model.weights import checkpoint_tensors, has_head
from mtllm_engine.tasks import Dataset, Example, Task, digest_of, find_dataset, load_task, pack
from mtllm_engine.training.engine import build_engine, shard
from mtllm_engine.training.layout import settle
from mtllm_engine.training.origins import check_origins, summed_in
from mtllm_engine.world import AgreedError, World

Kind = Literal["llm", "stack", "encoder"]
"""Who reads."""


@dataclass(frozen=True, kw_only=True)
class Test:
    """A test set in one language, and what the encoder and the translator are given for it."""

    dataset: Dataset
    folder: Path
    language: str
    resolved: Resolved
    translated: Resolved | None = None
    """None: nobody translates."""
    digest: str = ""
    """Of its examples, once they are checked."""

    @property
    def examples(self) -> Iterator[Example]:
        return self.dataset.read(self.folder, "test", self.language)

    def told(self, kind: Kind, *, translates: bool) -> Resolved | None:
        """What a reader's encoder, or the translator before it, is given; None: it has neither."""
        if translates:
            return self.translated
        return None if kind == "llm" else self.resolved

    def checked(self, task: Task) -> "Test":
        """Raises: ValueError: A row is malformed, or an example has nothing to compare with."""
        return replace(self, digest=digest_of(self._comparable(task)))

    def _comparable(self, task: Task) -> Iterator[Example]:
        for example in self.examples:
            if not (example.answers if task.head == "span" else example.label >= 0):
                wanted = "accepted answer" if task.head == "span" else "label"
                where = f"{self.dataset.name}:{self.folder} in {self.language}"
                lack = f"example {example.key} has no {wanted}"
                raise ValueError(f"task.test: {where}: {lack}; leave this test set out")
            yield example


class Reader:
    """The LLM, or the stack, with a task's head, loaded once for all test sets.

    Args:
        kind: Who reads: `objective.reader`.
        checkpoints: A run's, with a head; or several, whose adapters are added up.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        task: Task,
        kind: Kind,
        checkpoints: Sequence[str],
    ) -> None:
        self.kind: Kind = kind
        lora = world.together(lambda: sum_of([read_lora(Path(each)) for each in checkpoints]))
        model = replace(config.model, init_from=tuple(checkpoints), teacher="")
        objective = replace(config.objective, kind="finetune", reader=kind)
        asked = replace(config, model=model, objective=objective, lora=lora)
        self.config, layout = settle(asked, world)
        reader = "LLM" if kind == "llm" else kind
        world.on_main(lambda: print(f"{reader}'s weights: {layout}", flush=True))
        self.world, head = world, task.head_size
        world.on_main(lambda: check_origins(self.config))
        stack, weights = world.together(lambda: build_stack(self.config, head=head, learns=False))
        self.tokenizer = world.together(lambda: build_tokenizer(self.config, stack))
        self.engine = build_engine(self.config, shard(stack, weights, self.config, world), world)

    def __call__(self, corpus: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Keys, labels (N,) and scores (N, Y), of every document of a corpus, in its order, on
        every rank.

        Of a span task, instead of scores: the characters [start, end) (N, 2) of each text that
        answer.

        Raises:
            ValueError: As `read_corpus`.
        """
        with self.engine.evaluating():
            keys, labels, answers = read_corpus(
                self.config, self.world, self.tokenizer, corpus, self._read
            )
        return keys, labels, np.stack(answers)

    def _read(
        self, documents: Sequence[Document], batch: Batch, totals: Totals
    ) -> Sequence[np.ndarray]:
        return self._answers(documents, self.engine(batch, totals).outputs)

    def _answers(self, documents: Sequence[Document], outputs: Outputs) -> Sequence[np.ndarray]:
        """Of each document: scores (Y,), or the characters [start, end) that answer."""
        if outputs.answers_N2 is None:
            return outputs.scores_NY.float().cpu().numpy()
        reads_stack = self.config.objective.reader == "stack"
        side = "student_offsets_S2" if reads_stack else "teacher_offsets_T2"
        answers = zip(documents, outputs.answers_N2.cpu().numpy())
        return [getattr(doc, side)[start:end].ravel()[[0, -1]] for doc, (start, end) in answers]


class AnyReader(Protocol):
    """The LLM, the stack or the encoder alone, with a task's head."""

    kind: Kind

    def __call__(self, corpus: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
        """As `Reader`'s."""


def read_corpus(
    config: Config,
    world: World,
    tokenizer: PairTokenizer,
    corpus: Path,
    read: Callable[[Sequence[Document], Batch, Totals], Sequence[np.ndarray]],
) -> tuple[list[str], np.ndarray, list[np.ndarray]]:
    """Keys, labels (N,) and what `read` says of each document of a corpus, in its order, on every
    rank.

    Raises:
        ValueError: A document cannot be read, or not each was read once.
    """
    data = replace(config.data, teacher_states="", on_error="raise")
    options = {"seed": config.run.seed, "corpus": corpus}
    stream = world.together(lambda: build_stream(data, tokenizer, world, **options))
    rows = []
    for global_batch in each_step(stream, world, config.memory.max_tokens):
        for documents, batch in global_batch.batches(world.device):
            answers = zip(documents, read(documents, batch, global_batch.totals))
            rows += [(doc.row, doc.key, doc.label, answer) for doc, answer in answers]
    # All ranks' rows in the corpus' order: each document once, or the scores mean nothing.
    rows = sorted((row for part in world.gather(rows) for row in part), key=lambda row: row[0])
    shards = enumerate(stream.mixture.corpora[0].manifest.shards)
    expected = [(0, number, index) for number, each in shards for index in range(each.samples)]
    if [row[0] for row in rows] != expected:
        counts = f"{len(rows)} documents were scored of {len(expected)}"
        raise AgreedError(ValueError(f"{corpus}: {counts}"))
    _, keys, labels, answers = zip(*rows)
    return list(keys), np.array(labels), list(answers)


def results_folder(config: Config) -> Path:
    return Path(config.evaluate.results or Path(config.run.dir) / "results")


def find_systems(config: Config) -> tuple[Task, list[Test]]:
    """The task and its test sets, by all that evaluation needs.

    Raises:
        ValueError: As `find_tests`, or a checkpoint is missing or has no head.
    """
    if "sum" in config.evaluate.systems and not config.evaluate.stage1:
        lack = "needs evaluate.stage1, a checkpoint of stage 1; it is empty"
        raise ValueError(f"evaluate.systems has 'sum', which {lack}")
    for system, (kind, checkpoints) in readers(config).items():
        is_given = checkpoints and all(checkpoints)
        has_one = is_given and any(has_head(checkpoint_tensors(each)) for each in checkpoints)
        if kind != "encoder" and not has_one:
            key = "init_from" if system == "stack" else "teacher"
            lack = f"{' and '.join(checkpoints)} has none" if is_given else "it is empty"
            needs = f"needs model.{key}, a checkpoint with a head"
            raise ValueError(f"evaluate.systems has {system!r}, which {needs}; {lack}")
    return find_tests(config)


def readers(config: Config) -> dict[str, tuple[Kind, tuple[str, ...]]]:
    """Of each system who reads, and the checkpoints that made it; the encoder alone has none."""
    model = config.model
    every: dict[str, tuple[Kind, tuple[str, ...]]] = {
        "llm": ("llm", (model.teacher,)),
        "translate_test": ("llm", (model.teacher,)),
        "encoder": ("encoder", ()),
        "sum": ("stack", (*config.evaluate.stage1, model.teacher)),
        "stack": ("stack", model.init_from),
    }
    return {system: every[system] for system in config.evaluate.systems}


def find_tests(config: Config) -> tuple[Task, list[Test]]:
    """The task and its test sets, by all that evaluation needs besides checkpoints.

    Raises:
        ValueError: A test set, a language or the translator is missing, or the task takes no
            translation.
    """
    if not config.task.test:
        raise ValueError("task.test names no test set; write DATASET:FOLDER")
    task = load_task(config.task.name)
    translates = "translate_test" in config.evaluate.systems
    if task.head == "span" and translates:
        reason = "is answered with a piece of the text, and a translation has other pieces"
        system = f"evaluate.systems has 'translate_test', but task {task.name}"
        raise ValueError(f"{system} {reason}; leave it out")
    if "encoder" in config.evaluate.systems:
        _check_english(config, task)
    translator = _translator_languages(_translator_name(config)) if translates else None
    return task, _tests(config, task, read_languages(resolve(config.model.encoder)), translator)


def _check_english(config: Config, task: Task) -> None:
    """Raises: ValueError: The encoder alone cannot learn the task."""
    system = f"evaluate.systems has 'encoder', but task {task.name}"
    if task.head == "span":
        reason = "is answered with a piece of the text, which no mean of states tells"
        raise ValueError(f"{system} {reason}; leave it out")
    if not config.task.train:
        raise ValueError(f"{system} has no English examples for its head; set task.train")
    for split in ("train", "validation"):
        if source := getattr(config.task, split):
            dataset, folder = find_dataset(task, source)
            if all(example.label < 0 for example in dataset.read(folder, split, ENGLISH)):
                raise ValueError(f"{system}, and task.{split} has no labels: {source}; set another")


def _translator_languages(name: str) -> EncoderLanguages:
    """Raises: ValueError: There is no such model, or it is none of NLLB's form."""
    languages = read_languages(find_model(name))
    if not all(map(is_well_formed, languages.tokens.values())) or not languages.tokens:
        fix = "set evaluate.translator to an NLLB model, or leave it out"
        raise ValueError(
            f"evaluate.systems has 'translate_test', and {name} has no tokens as NLLB's; {fix}"
        )
    return languages


def _tests(
    config: Config, task: Task, encoder: EncoderLanguages, translator: EncoderLanguages | None
) -> list[Test]:
    """Each test set in those of the languages asked for that it has; in all that it has, where none
    is asked for.

    Args:
        translator: None: nobody translates.

    Raises:
        ValueError: A language is in no test set, or a test set has none of the languages that a
            system can read, or is malformed, or has no labels.
    """
    asked, fallback = config.evaluate.languages, config.languages.fallback
    # What there is, by test set: a benchmark's own code is ours by its own table, or the others'.
    sources = {source: find_dataset(task, source) for source in config.task.test}
    tables = [dataset.languages for dataset, _ in sources.values()]
    sets: dict[str, list[Test]] = {}
    missing = set(asked)
    for source, (dataset, folder) in sources.items():
        meant = {typed: _ours(typed, dataset.languages, tables) for typed in asked}
        codes = [] if asked else dataset.present(folder, "test")
        for typed, meanings in meant.items():
            there = [code for code in meanings if dataset.has(folder, "test", code)]
            codes += [code for code in there if code not in codes]
            missing -= {typed} if there else set()
        sets[source] = [
            Test(
                dataset=dataset,
                folder=folder,
                language=code,
                resolved=encoder.resolve(code, fallback),
                translated=translator and translator.resolve(code, fallback),
            )
            for code in codes
        ]
    # Whether it is all that is asked for, and of use to some system.
    tests = [test for part in sets.values() for test in part]
    if missing:
        present = [each.present(folder, "test") for each, folder in sources.values()]
        near = ", ".join(nearest(min(missing), sorted(set().union(*present))))
        where = f"which is in no test set of {', '.join(config.task.test)}"
        fix = f"did you mean {near}? " if near else ""
        fix += "Leave it out or add a set that has it" if near else "add a set that has it"
        raise ValueError(f"evaluate.languages has {min(missing)}, {where}; {fix}")
    for source, part in sets.items():
        if not part:
            fix = " of evaluate.languages; leave it out, or add one that it has" if asked else ""
            raise ValueError(f"task.test: {source} has no test examples in any language{fix}")
        given = (each.given for test in part for each in _needed(test, config.evaluate.systems))
        if "llm" not in config.evaluate.systems and not any(given):
            lack = f"the encoder has no token for any language of {source}"
            raise ValueError(f"task.test: {lack}; declare languages.fallback, or leave it out")
    return [test.checked(task) for test in tests]


def _needed(test: Test, systems: Collection[str]) -> list[Resolved]:
    """What those systems that are not the LLM alone are given."""
    needs_encoder = {"stack", "sum", "encoder"} & {*systems}
    each = (test.resolved if needs_encoder else None, test.translated)
    return [resolved for resolved in each if resolved]


def _ours(typed: str, table: Mapping[str, str], tables: Sequence[Mapping[str, str]]) -> list[str]:
    """Our codes for one of `evaluate.languages`.

    Args:
        table: A set's own codes, and ours; `tables` are those of all sets.
    """
    if is_well_formed(typed):
        return [typed]
    meanings = [each[typed] for each in ([table] if typed in table else tables) if typed in each]
    return sorted(set(meanings))


def build_translator(config: Config, world: World) -> Translator:
    """Raises: ValueError: There is no such model."""
    cache = Path(config.evaluate.translations or results_folder(config) / "translations")
    num_beams = config.evaluate.num_beams
    return Translator(_translator_name(config), cache=cache, world=world, num_beams=num_beams)


def _translator_name(config: Config) -> str:
    return config.evaluate.translator or config.model.encoder


def predict(
    config: Config,
    world: World,
    task: Task,
    reader: AnyReader,
    translator: Translator | None,
    test: Test,
) -> Predictions:
    """What one reader says of a test set: nothing where its language has no token and the encoder
    is needed."""
    # Who is asked what, and whether there is anything to say.
    reads_foreign = reader.kind != "llm"
    told = test.told(reader.kind, translates=translator is not None)
    given = told and told.given
    about = {"system": "stack", "dataset": test.dataset.name, "language": test.language}
    about |= {"seed": config.run.seed, "metric": task.metric}
    about |= {"language_status": told.status, "language_given": given} if told else {}
    if told and given is None:
        return Predictions(**about, keys=(), labels=(), predictions=())
    # What is read: the examples, or their translations, which took their time now or before.
    examples, translation_s = test.examples, 0.0
    is_translated = translator is not None and test.language != ENGLISH
    if is_translated:
        by = config.evaluate.translate_by
        translated = translate_examples(list(examples), translator, source=given, by=by)
        examples, translation_s = translated.examples, translated.wall_s
        about |= translated.counts
    start_s = time.perf_counter()
    corpus = results_folder(config) / "corpus"
    corpus /= "translated" if translator else reader.kind
    corpus = corpus / test.dataset.name / test.language
    # The LLM alone has no use for the encoder's token: any will do for the side that nobody reads.
    language = given if reads_foreign else ENGLISH
    options = {"language": language, "licence": test.dataset.licence}
    world.on_main(lambda: _pack_anew(examples, corpus, results_folder(config), **options))
    # What is said, and how long that took. English, as it is, does not show what translating takes.
    keys, labels, answers = reader(corpus)
    wall_s = translation_s + time.perf_counter() - start_s
    if task.head == "span":
        columns = world.together(lambda: _texts(test, keys, answers))
    else:
        columns = {"labels": labels, "predictions": answers.argmax(1)}
        columns["num_classes"] = answers.shape[1]
    is_timed = is_translated or translator is None
    latency_s = 1000 * wall_s / len(keys) if is_timed else None
    return Predictions(**about, keys=keys, **columns, latency_s=latency_s)


def _pack_anew(
    examples: Iterable[Example], corpus: Path, results: Path, *, language: str, licence: str
) -> None:
    """Nothing of an earlier evaluation is trusted: its texts may be other ones. Nothing else, in
    the folder of results or outside, is removed.

    Raises:
        ValueError: The corpus would lie outside.
    """
    if not corpus.resolve().is_relative_to(results.resolve()):
        raise ValueError(f"{corpus} is, or lies behind, a link out of {results}; remove that link")
    if (corpus / "manifest.json").is_file():
        shutil.rmtree(corpus)
    pack(examples, corpus, language=language, licence=licence)


def _texts(test: Test, keys: Sequence[str], answers_N2: np.ndarray) -> dict[str, list]:
    """Accepted answers and the answer given of each example, as text."""
    examples = {example.key: example for example in test.examples}
    labels = [[examples[key].text[slice(*each)] for each in examples[key].answers] for key in keys]
    given = [examples[key].text[start:end].strip() for key, (start, end) in zip(keys, answers_N2)]
    return {"labels": labels, "predictions": given}


def cost(checkpoints: Sequence[str]) -> tuple[float | None, float | None]:
    """GPU-hours and FLOPs that checkpoints took, with the runs and stored states that they stand
    on, each once; None: not known, or nothing was trained."""
    costs: dict[Path, tuple[float, float]] = {}
    try:
        for checkpoint in checkpoints:
            _add_costs(Path(checkpoint), costs)
    except (OSError, ValueError, KeyError):
        return None, None
    if not costs:
        return None, None
    hours, flops = zip(*costs.values())
    return sum(hours), sum(flops)


def _add_costs(checkpoint: Path, costs: dict[Path, tuple[float, float]]) -> None:
    """Of a run's own steps, of stored states that it read, and of what it stands on, by folder."""
    if parts := summed_in(checkpoint):
        for part in parts:
            _add_costs(part, costs)
        return
    run = checkpoint.resolve().parent.parent
    if run in costs:
        return
    config = configs.load(run / "config.toml")
    ranks = json.loads((run / "environment.json").read_text())["world_size"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    hours = sum(row["step_s"] for row in steps) * ranks / 3600
    costs[run] = (hours, sum(row["flops"] for row in steps))
    if states := config.data.teacher_states:
        for corpus in filter(None, (*config.data.train, config.validation.corpus)):
            costs[folder_of(Path(corpus), states)] = cost_of(Path(corpus), states)
    # What it started from and learned from.
    for path in filter(None, (*config.model.init_from, config.model.teacher)):
        _add_costs(Path(path), costs)
