"""Zero-shot evaluation: every system in every language, over all ranks, into one table.

    deepspeed --num_gpus N --module mtllm_engine.evaluate CONFIG [section.key=value ...]

The LLM of `model.teacher` reads the foreign text ("llm"), or its English translation ("translate_test"); the stack of
`model.start` reads the foreign text through the MT encoder ("stack"). Nobody has seen a label but English ones.
"""

import json
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mtllm_engine import config as configs
from mtllm_engine import results
from mtllm_engine.config import Config
from mtllm_engine.data.batch import Document, collate
from mtllm_engine.data.languages import Resolved, resolve_language
from mtllm_engine.data.stream import agree, build_stream
from mtllm_engine.data.targets import cost_of
from mtllm_engine.data.tokenizers import language_tokens, load_tokenizer
from mtllm_engine.engine import build_engine, shard
from mtllm_engine.model.pretrained import build_stack, build_tokenizer, has_head, read_lora, resolve, run_checkpoint
from mtllm_engine.objective import Outputs
from mtllm_engine.results import Predictions
from mtllm_engine.tasks import ENGLISH, Dataset, Example, Task, find_dataset, load_task, pack
from mtllm_engine.train import run_command
from mtllm_engine.translate import Translator, find_model, translate_examples
from mtllm_engine.world import Agreed, World


@dataclass(frozen=True, kw_only=True)
class Test:
    """A test set in one language, and what the encoder is given for it."""

    dataset: Dataset
    folder: Path
    language: str
    resolved: Resolved

    @property
    def examples(self) -> Iterator[Example]:
        return self.dataset.read(self.folder, "test", self.language)

    def check(self, task: Task) -> None:
        """Raises: ValueError: A row is malformed, or an example has nothing to compare a prediction with."""
        for example in self.examples:
            if not (example.answers if task.head == "span" else example.label >= 0):
                wanted = "accepted answer" if task.head == "span" else "label"
                where = f"{self.dataset.name}:{self.folder} in {self.language}"
                raise ValueError(f"task.test: {where}: example {example.key} has no {wanted}; leave this test set out")


class Reader:
    """The LLM, or the stack, with a task's head, loaded once for all test sets.

    Args:
        kind: "llm" or "stack": `objective.reader`.
        checkpoint: A run's, with a head.
    """

    def __init__(self, config: Config, world: World, kind: str, checkpoint: str) -> None:
        lora = world.together(lambda: read_lora(Path(checkpoint).expanduser()))
        model = replace(config.model, start=checkpoint, teacher="")
        objective = replace(config.objective, kind="evaluate", reader=kind)
        self.config, self.world = replace(config, model=model, objective=objective, lora=lora), world
        stack, weights = world.together(lambda: build_stack(self.config))
        self.tokenizer = world.together(lambda: build_tokenizer(self.config, stack))
        self.engine = build_engine(self.config, shard(stack, weights, self.config, world), world)

    def __call__(self, corpus: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Keys, labels (N,) and scores (N, C), of every document of a corpus, in its order, on every rank.

        Of a span task, instead of scores: the characters [start, end) (N, 2) of each text that answer.

        Raises:
            ValueError: A document cannot be read, or not each was read once.
        """
        data = replace(self.config.data, validation=str(corpus), targets="", on_error="raise")
        stream = self.world.together(
            lambda: build_stream(data, self.tokenizer, self.world, seed=self.config.run.seed, epochs=1)
        )
        rows = []
        with self.engine.evaluating():
            while (work := agree(stream, self.world, self.config.memory.max_tokens)).totals.documents:
                for documents in work.micro_batches:
                    batch = collate(documents, step_seed=0, device=self.world.device, idle=work.idle)
                    found = self._found(documents, self.engine(batch, work.totals).outputs)
                    rows += [(doc.row, doc.key, doc.label, each) for doc, each in zip(documents, found)]
        stream.close()
        rows = sorted((row for part in self.world.gather(rows) for row in part), key=lambda row: row[0])
        shards = enumerate(stream.mixture.corpora[0].manifest.shards)
        expected = [(0, number, index) for number, each in shards for index in range(each.samples)]
        if [row[0] for row in rows] != expected:
            raise Agreed(ValueError(f"{corpus}: {len(rows)} documents were scored of {len(expected)}"))
        _, keys, labels, scores = zip(*rows)
        return list(keys), np.array(labels), np.stack(scores)

    def _found(self, documents: Sequence[Document], outputs: Outputs) -> np.ndarray | list[np.ndarray]:
        if outputs.answers_N2 is None:
            return outputs.scores_NC.float().cpu().numpy()
        side = "student_offsets_S2" if self.config.objective.reader == "stack" else "teacher_offsets_T2"
        answers = zip(documents, outputs.answers_N2.cpu().numpy())
        return [getattr(document, side)[start:end].ravel()[[0, -1]] for document, (start, end) in answers]


def evaluate(config: Config, world: World) -> None:
    """Writes predictions and tables below `evaluate.results`; what is there of this seed is made again.

    Raises:
        ValueError: A checkpoint, a test set or a model is missing or unfit.
    """
    folder = results_folder(config)
    task, tests = world.together(lambda: _prepare(config))
    for kind, checkpoint in (("llm", config.model.teacher), ("stack", config.model.start)):
        systems = [system for system in config.evaluate.systems if (system == "stack") == (kind == "stack")]
        if not systems:
            continue
        spent = world.on_main(partial(cost, Path(checkpoint)))
        reader = Reader(config, world, kind, checkpoint)
        for system in systems:
            translator = _translator(config, world) if system == "translate_test" else None
            for test in tests:
                found = _predict(config, world, task, reader, translator, test)
                costs = {"gpu_hours": spent[0], "flops": spent[1]}
                name = config.evaluate.stack_name if system == "stack" else system
                world.on_main(partial(results.save, folder, replace(found, system=name, **costs)))
    world.on_main(lambda: print(results.write(folder, baseline=_baseline(folder)).read_text()))


def results_folder(config: Config) -> Path:
    return Path(config.evaluate.results or Path(config.run.dir) / "results")


def cost(checkpoint: Path) -> tuple[float | None, float | None]:
    """GPU-hours and FLOPs that a checkpoint took, with the runs and targets that it stands on; None: not known."""
    run = checkpoint.expanduser().resolve().parent.parent
    try:
        config = configs.load(run / "config.toml")
        ranks = json.loads((run / "environment.json").read_text())["world_size"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [(row["step_s"], row["flops"]) for row in rows if "loss" in row]
        corpora = {path for path in (*config.data.train, config.data.validation) if path and config.data.targets}
        below = [cost_of(Path(corpus), config.data.targets) for corpus in corpora]
    except (OSError, ValueError, KeyError):
        return None, None
    below += [cost(Path(folder)) for folder in (config.model.start, config.model.teacher) if folder]
    if any(None in each for each in below):
        return None, None
    hours, flops = sum(each[0] for each in steps) * ranks / 3600, sum(each[1] for each in steps)
    return hours + sum(each[0] for each in below), flops + sum(each[1] for each in below)


def _prepare(config: Config) -> tuple[Task, list[Test]]:
    """Raises: ValueError: Something that evaluation needs is not configured, or a test set is not fit for it."""
    needed = {"llm": "model.teacher", "translate_test": "model.teacher", "stack": "model.start"}
    for system in config.evaluate.systems:
        key = needed[system]
        checkpoint = getattr(config.model, key.partition(".")[2])
        if not checkpoint or not has_head(run_checkpoint(checkpoint)):
            found = f"{checkpoint} has none" if checkpoint else "it is empty"
            raise ValueError(f"evaluate.systems has {system!r}, which needs {key}, a checkpoint with a head; {found}")
    return find_tests(config)


def find_tests(config: Config) -> tuple[Task, list[Test]]:
    """The task and its test sets, by all that evaluation needs besides checkpoints.

    Raises:
        ValueError: A test set, a language or the translator is missing, or the task takes no translation.
    """
    if not config.task.test:
        raise ValueError("task.test names no test set; write DATASET:FOLDER")
    task = load_task(config.task.name)
    if task.head == "span" and "translate_test" in config.evaluate.systems:
        told = f"task {task.name} is answered with a piece of the text, and a translation has other pieces"
        raise ValueError(f"evaluate.systems has 'translate_test', but {told}; leave it out")
    if "translate_test" in config.evaluate.systems:
        find_model(_translator_name(config))
    return task, _tests(config, task, language_tokens(load_tokenizer(resolve(config.model.encoder))))


def _tests(config: Config, task: Task, languages: Collection[str]) -> list[Test]:
    """Each test set in those of the languages asked for that it has; in all that it has, where none is asked for.

    Args:
        languages: Those of the encoder's tokenizer.

    Raises:
        ValueError: A language is in no test set, or a test set has none of the languages that a system can read, or is
            malformed, or has no labels.
    """
    asked, known = config.evaluate.languages, (languages, config.languages.fallback)
    found: dict[str, list[Test]] = {}
    for source in config.task.test:
        dataset, folder = find_dataset(task, source)
        there = filter(partial(dataset.has, folder, "test"), asked) if asked else dataset.present(folder, "test")
        found[source] = [
            Test(dataset=dataset, folder=folder, language=code, resolved=resolve_language(code, *known))
            for code in there
        ]
    tests = [test for part in found.values() for test in part]
    if missing := set(asked) - {test.language for test in tests}:
        told = f"evaluate.languages has {min(missing)}, which is in no test set of {', '.join(config.task.test)}"
        raise ValueError(f"{told}; leave it out or add one that has it")
    for source, part in found.items():
        if not part:
            asked_for = " of evaluate.languages; leave it out, or add one that it has" if asked else ""
            raise ValueError(f"task.test: {source} has no test examples in any language{asked_for}")
        if "llm" not in config.evaluate.systems and not any(test.resolved.given for test in part):
            told = f"task.test: the encoder has no token for any language of {source}"
            raise ValueError(f"{told}; declare languages.fallback, or leave it out")
    for test in tests:
        test.check(task)
    return tests


def _translator(config: Config, world: World) -> Translator:
    cache = Path(config.evaluate.translations or results_folder(config) / "translations")
    return Translator(_translator_name(config), cache=cache, world=world, num_beams=config.evaluate.num_beams)


def _translator_name(config: Config) -> str:
    return config.evaluate.translator or config.model.encoder


def _predict(
    config: Config, world: World, task: Task, reader: Reader, translator: Translator | None, test: Test
) -> Predictions:
    """What one reader says of a test set: nothing where its language has no token and the encoder is needed."""
    needs_encoder = translator is not None or reader.config.objective.reader == "stack"
    given, status = test.resolved
    about = {"system": "stack", "dataset": test.dataset.name, "language": test.language}
    about |= {"seed": config.run.seed, "metric": task.metric}
    about |= {"language_status": status, "language_given": given} if needs_encoder else {}
    if needs_encoder and given is None:
        return Predictions(**about, keys=(), labels=(), predictions=())
    examples, translation_s, is_translated = test.examples, 0.0, translator is not None and test.language != ENGLISH
    if is_translated:
        examples, translation_s = translate_examples(list(examples), translator, source=given)
    start_s = time.perf_counter()
    # The LLM alone has no use for the encoder's token: any will do for the side that nobody reads.
    language = given if reader.config.objective.reader == "stack" else ENGLISH
    corpus = results_folder(config) / "corpus" / ("translated" if translator else reader.config.objective.reader)
    corpus = corpus / test.dataset.name / test.language
    world.on_main(lambda: _pack_anew(examples, corpus, language, test.dataset.licence))
    keys, labels, found = reader(corpus)
    wall_s = translation_s + time.perf_counter() - start_s
    if task.head == "span":
        columns = {"keys": keys, **world.together(lambda: _texts(test, keys, found))}
    else:
        columns = {"keys": keys, "labels": labels, "predictions": found.argmax(1), "num_classes": found.shape[1]}
    is_timed = is_translated or translator is None  # English, as it is, does not show what translating takes
    return Predictions(**about, **columns, latency_s=1000 * wall_s / len(keys) if is_timed else None)


def _texts(test: Test, keys: Sequence[str], answers_N2: np.ndarray) -> dict[str, list]:
    """Accepted answers and the answer given of each example, as text."""
    examples = {example.key: example for example in test.examples}
    labels = [[examples[key].text[slice(*answer)] for answer in examples[key].answers] for key in keys]
    given = [examples[key].text[start:end].strip() for key, (start, end) in zip(keys, answers_N2)]
    return {"labels": labels, "predictions": given}


def _pack_anew(examples: Iterable[Example], corpus: Path, language: str, licence: str) -> None:
    """Nothing of an earlier evaluation is trusted: its texts may be other ones."""
    shutil.rmtree(corpus, ignore_errors=True)
    pack(examples, corpus, language=language, licence=licence)


def _baseline(folder: Path) -> str | None:
    """What the others are compared with: translate-test, if it is there."""
    return "translate_test" if any(folder.glob("*/translate_test")) else None


if __name__ == "__main__":
    sys.exit(run_command(evaluate, "evaluate"))
