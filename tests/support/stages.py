"""Stage 1, the English task and stage 2 on tiny checkpoints: their files, their configurations,
their runs.
"""

import contextlib
import csv
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mtllm_engine import evaluate as evaluation
from mtllm_engine.config import Config
from mtllm_engine.data.batch import Document
from mtllm_engine.evaluation.systems import Reader
from mtllm_engine.finetune import finetune
from mtllm_engine.model.objective import Outputs
from mtllm_engine.tasks.sib200 import LABELS
from mtllm_engine.train import train
from tests.support.tiny import (
    WORDS,
    build_config,
    build_corpus,
    build_decoder,
    build_encoder,
    build_world,
    texts,
)

ALONE = build_world()
SHORT = [word for word in WORDS if word.isalpha() and len(word) < 6]
SOURCES = {
    "sib200": "sib200:{}/topics",
    "belebele": "belebele_training:{}/questions",
    "xquad": "squad:{}/squad",
}


def build_models(folder: Path) -> Path:
    """`encoder`, `decoder` and stage 1's corpus `train`."""
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    build_corpus(folder / "train", 24)
    return folder


def write_topics(folder: Path, language: str, *, seed: int = 0, **counts: int) -> None:
    """SIB-200 files in a language: `counts` examples of each split (`train`, `dev`, `test`)."""
    generator = random.Random(seed)
    for number, (split, count) in enumerate(counts.items()):
        rows = [
            (key, generator.choice(LABELS), text)
            for key, text in enumerate(texts(count, seed=seed + number))
        ]
        _write_table(
            folder / "topics" / language / f"{split}.tsv", ("index_id", "category", "text"), rows
        )


def write_questions(folder: Path, *, seed: int = 0, **counts: int) -> None:
    """Belebele's training set, English: `counts` questions of each split (`train`, `dev`)."""
    generator, rows = random.Random(seed), []
    for split, count in counts.items():
        for passage in texts(count, seed=seed):
            question, *choices = generator.choices(SHORT, k=5)
            rows.append((split, passage, question, *choices, generator.randint(1, 4)))
    columns = (
        "split",
        "passage",
        "question",
        *(f"answer{number}" for number in range(1, 5)),
        "correct_answer_num",
    )
    _write_table(folder / "questions" / "belebele_training_set.tsv", columns, rows)


def write_belebele(path: Path, language: str) -> None:
    """Belebele's file in a language: seven questions."""
    path.parent.mkdir(exist_ok=True)
    lines = []
    for number, passage in enumerate(texts(7, seed=len(language))):
        choices = {f"mc_answer{choice}": f"{'abcd'[choice - 1]} {number}" for choice in range(1, 5)}
        row = {
            "flores_passage": passage,
            "question": "or?",
            "correct_answer_num": str(1 + number % 4),
        } | choices
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


def write_passages(path: Path, count: int, *, seed: int, longest: int = 12) -> None:
    """SQuAD 1.1: the answer is the word behind the one that is asked for, and any other answer is
    accepted too.
    """
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(passages(count, seed=seed, longest=longest)))


def passages(count: int, *, seed: int, longest: int = 12) -> dict:
    """What `write_passages` writes."""
    generator = random.Random(seed)
    words = [word for word in dict.fromkeys(WORDS) if word.isalpha()]
    paragraphs = []
    for number in range(count):
        passage = generator.sample(words, generator.randint(4, longest))
        asked = generator.randrange(len(passage) - 1)
        start = len(" ".join(passage[: asked + 1])) + 1
        answers = [
            {"text": passage[asked + 1], "answer_start": start},
            {"text": passage[0], "answer_start": 0},
        ]
        question = {"id": f"q{number}", "question": passage[asked], "answers": answers}
        paragraphs.append({"context": " ".join(passage), "qas": [question]})
    return {"data": [{"paragraphs": paragraphs}]}


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])


def stage1_config(folder: Path, **sections) -> Config:
    return _config(folder, "stage1", **sections)


def finetuning_config(folder: Path, task: str, reader: str = "llm", **sections) -> Config:
    """Of the LLM, or the stack, on a task's English files."""
    return _config(
        folder,
        f"finetune-{task}",
        task,
        objective={"kind": "finetune", "reader": reader},
        **sections,
    )


def stage2_config(folder: Path, task: str, **sections) -> Config:
    """From stage 1's last checkpoint towards the fine-tuned LLM's best."""
    checkpoints = {
        "init_from": checkpoint(folder, "stage1", "latest"),
        "teacher": checkpoint(folder, f"finetune-{task}"),
    }
    model = {key: str(path) for key, path in checkpoints.items()} | sections.pop("model", {})
    return _config(folder, f"stage2-{task}", task, model=model, **sections)


def evaluation_config(folder: Path, task: str, test: str, **sections) -> Config:
    """Of the best checkpoints of both runs; Minangkabau in Arabic script is given to the encoder as
    Indonesian.
    """
    checkpoints = {
        "init_from": checkpoint(folder, f"stage2-{task}"),
        "teacher": checkpoint(folder, f"finetune-{task}"),
    }
    model = {key: str(path) for key, path in checkpoints.items()} | sections.pop("model", {})
    sections = {
        "data": {"train": []},
        "languages": {"fallback": {"min_Arab": "ind_Latn"}},
    } | sections
    return _config(
        folder, f"evaluate-{task}", model=model, task={"name": task, "test": [test]}, **sections
    )


def _config(folder: Path, name: str, learned: str = "", **sections) -> Config:
    """Args: learned: a task whose English files are trained and validated on."""
    merged = {
        "zero": {"stage": 0},
        "data": {"lanes": 4},
        "optim": {"steps": 3, "lr": 0.01, "warmup_ratio": 0.0},
    }
    merged |= {"run": {"dir": str(folder / name)}}
    if learned:
        source = SOURCES[learned].format(folder)
        merged["data"] |= {"train": []}
        merged["task"] = {"name": learned, "train": source, "validation": source}
    for section, values in sections.items():
        merged[section] = merged.get(section, {}) | values
    return build_config(folder, **merged)


BATCHES = {
    "one lane": {"data": {"train": [], "lanes": 1}},
    "more lanes than documents": {"data": {"train": [], "lanes": 64}},
    "packs by tokens": {"data": {"train": [], "pack_documents": 0, "pack_tokens": 100}},
    "all at once": {"memory": {"max_tokens": 100_000}},
    "one by one": {
        "data": {"train": [], "lanes": 3, "pack_documents": 1},
        "memory": {"max_tokens": 64},
    },
}
"""Sections that say how what is evaluated is batched, and nothing else."""


@contextlib.contextmanager
def recorded_scores() -> Iterator[dict[str, dict]]:
    """What every reader says of every corpus, by the corpus' folder: `llm/sib200/eng_Latn`,
    `translated/...`.

    Of a span task the scores are the answer's characters, and `states` what is pooled of the
    passage.
    """
    recorded: dict[str, dict] = {}

    class RecordingReader(Reader):
        def _answers(self, documents: Sequence[Document], outputs: Outputs) -> Sequence[np.ndarray]:
            answers = super()._answers(documents, outputs)
            self.is_span = outputs.answers_N2 is not None
            if not self.is_span:
                return answers
            return list(map(np.concatenate, zip(answers, outputs.student_PD.numpy())))

        def __call__(self, corpus: Path) -> tuple:
            keys, labels, answers = super().__call__(corpus)
            states_ND = answers[:, 2:] if self.is_span else answers[:, :0]
            answers = answers[:, :2].astype(int) if self.is_span else answers
            rows = {"keys": keys, "labels": labels.tolist(), "scores": answers.tolist()}
            recorded["/".join(corpus.parts[-3:])] = rows | {"states": states_ND.tolist()}
            return keys, labels, answers

    evaluation.Reader = RecordingReader
    try:
        yield recorded
    finally:
        evaluation.Reader = Reader


def run_stages(folder: Path, task: str, **finetuning) -> None:
    """All three runs, one after the other. Args: finetuning: sections of the second's
    configuration.
    """
    train(stage1_config(folder), ALONE)
    finetune(finetuning_config(folder, task, **finetuning), ALONE)
    train(stage2_config(folder, task), ALONE)


def checkpoint(folder: Path, run: str, name: str = "best") -> Path:
    return folder / run / "checkpoints" / name


def rows(run: Path) -> list[dict]:
    """All that a run's metrics.jsonl says."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in rows(run) if "loss" in row]
