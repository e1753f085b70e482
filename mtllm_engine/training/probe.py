"""The cross-lingual probe: during training, does the student read a foreign line as the teacher
reads the English one?

Parallel lines as FLORES-200 publishes them. Every rank reads its share of the lines of each
language; their states meet in one table, of which every figure is computed, so nothing depends on
how many ranks there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mtllm_engine.config import Config
from mtllm_engine.data.annotations import NO_ANNOTATIONS
from mtllm_engine.data.batch import IDLE, ONE_PART, Document, Pack, Totals, collate, join
from mtllm_engine.data.encoder_languages import EncoderLanguages
from mtllm_engine.data.tokenizers import PairTokenizer, Reading
from mtllm_engine.languages import ENGLISH, is_well_formed
from mtllm_engine.training.engine import PlainEngine, ZeroEngine
from mtllm_engine.world import World


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well the student's states of foreign lines agree with the teacher's of the English
    ones.
    """

    fvu: float
    cosine: float
    retrieval: (
        float  # the share of lines whose own teacher state is the nearest of all lines', by cosine
    )


class Probe:
    """The probe's lines, tokenised once, each cut at `data.max_length` tokens; calling it measures.

    Args:
        lines: By language; English may be one of them.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        tokenizer: PairTokenizer,
        english: Sequence[str],
        lines: dict[str, list[str]],
    ) -> None:
        self.world, self.num_lines = world, len(english)
        self.indices = range(world.rank, len(english), world.size)  # of this rank's lines
        self.idle = replace(IDLE, parts_Q2=None if tokenizer.parts == "whole" else ONE_PART)
        # Each side cuts its line alone: it is not the other's.
        teacher, student = (
            tokenizer.read_by(reader, truncation="independent") for reader in ("llm", "stack")
        )
        taught = [_read_line(teacher, english[i], ENGLISH) for i in self.indices]
        self.micro_batches: dict[str, list[list[Document]]] = {}
        for language, texts in lines.items():
            read = [_read_line(student, texts[i], language) for i in self.indices]
            triples = zip(self.indices, read, taught)
            packs = [Pack(documents=(_document(*each),), state={}) for each in triples]
            self.micro_batches[language] = join(packs, config.memory.max_tokens)

    def __call__(self, engine: PlainEngine | ZeroEngine) -> dict[str, Agreement]:
        """Agreement by language, the same on every rank; all ranks call it."""
        counts = self.world.gather_ints([len(batches) for batches in self.micro_batches.values()])
        agreements = {}
        with engine.evaluating():
            # As many forwards on every rank: ZeRO-3's collectives must match.
            for (language, batches), *nums in zip(self.micro_batches.items(), *counts):
                agreements[language] = measure(*self._states(engine, batches, max(nums)))
        return agreements

    def summary(self, agreements: dict[str, Agreement]) -> tuple[dict[str, Any], str]:
        """Agreements as a row of metrics.jsonl, by language and on average, and in words."""
        mean = asdict(average(agreements))
        row = {f"probe_{name}": value for name, value in mean.items()}
        row["probe_lines"] = self.num_lines
        for language, agreement in agreements.items():
            row |= {f"probe_{name}/{language}": value for name, value in asdict(agreement).items()}
        values = ", ".join(f"{name} {value:.4f}" for name, value in mean.items())
        num_foreign = len(agreements.keys() - {ENGLISH})
        return row, f"probe, {self.num_lines} lines in {num_foreign} languages: {values}"

    def _states(
        self, engine: PlainEngine | ZeroEngine, micro_batches: Sequence[list[Document]], num: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's and teacher's state of each line, fp32 (N, D), on every rank, by `num` forwards
        of this one."""
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for documents in [*micro_batches, *[[]] * (num - len(micro_batches))]:
            count = len(documents)
            batch = collate(documents, step_seed=0, device=self.world.device, idle=self.idle)
            outputs = engine(batch, Totals(count, count)).outputs
            rows.append((outputs.student_PD[:count], outputs.teacher_PD[:count]))
        student_ND, teacher_ND = (self._gathered(torch.cat(side)) for side in zip(*rows))
        return student_ND, teacher_ND

    def _gathered(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """All ranks' rows, each in its line's place: the sum of tables that are zero elsewhere."""
        table_ND = rows_ND.new_zeros(self.num_lines, rows_ND.shape[1])
        table_ND[self.world.rank :: self.world.size] = rows_ND
        return self.world.sum(table_ND)


def open_probe(config: Config, world: World, tokenizer: PairTokenizer) -> Probe | None:
    """The probe that a configuration asks for, if it does.

    Raises:
        ValueError: A file is missing, or its lines are not parallel to the English ones; a language
            is unknown.
    """
    if not config.probe.folder:
        return None
    english, lines = find_lines(config, tokenizer.languages)
    return Probe(config, world, tokenizer, english, lines)


def find_lines(config: Config, known: EncoderLanguages) -> tuple[list[str], dict[str, list[str]]]:
    """The probe's English lines, and those of each language that is asked for or, where none is,
    that is there and known.

    Raises:
        ValueError: As `open_probe`.
    """
    folder, split = Path(config.probe.folder), config.probe.split
    english = _read(_path(folder, split, ENGLISH))
    count = min(config.probe.lines or len(english), len(english))
    lines = {}
    for language in config.probe.languages or _present(folder, split, known):
        known.token_of(language)
        path = _path(folder, split, language)
        texts = _read(path)
        if len(texts) != len(english):
            counts = f"{path} has {len(texts)} lines, the English file {len(english)}"
            rule = "line i of one must translate line i of the other"
            raise ValueError(f"probe.folder: {counts}: {rule}")
        lines[language] = texts[:count]
    if not set(lines) - {ENGLISH}:
        lack = f"no language but English in {split} that the encoder knows"
        raise ValueError(f"probe.folder: {folder} has {lack}")
    return english[:count], lines


def measure(student_ND: torch.Tensor, teacher_ND: torch.Tensor) -> Agreement:
    """Line i of one is line i of the other. Of equally near teacher states the first counts as the
    nearest.
    """
    student_ND, teacher_ND = student_ND.double(), teacher_ND.double()
    variance = (teacher_ND - teacher_ND.mean(0)).square().sum().item()
    similarity_NN = (
        functional.normalize(student_ND, dim=1) @ functional.normalize(teacher_ND, dim=1).T
    )
    lines_N = torch.arange(len(student_ND), device=student_ND.device)
    return Agreement(
        fvu=(student_ND - teacher_ND).square().sum().item() / variance
        if variance > 0
        else float("nan"),
        cosine=similarity_NN.diagonal().mean().item(),
        retrieval=(similarity_NN.argmax(1) == lines_N).double().mean().item(),
    )


def average(agreements: dict[str, Agreement]) -> Agreement:
    """The mean over languages but English, which training reads."""
    foreign = [each for language, each in agreements.items() if language != ENGLISH]
    names = [each.name for each in fields(Agreement)]
    return Agreement(
        **{name: float(np.mean([getattr(each, name) for each in foreign])) for name in names}
    )


def _read_line(tokenizer: PairTokenizer, line: str, language: str) -> Reading:
    return tokenizer.example(line, language, NO_ANNOTATIONS)[0]


def _document(index: int, student: Reading, teacher: Reading) -> Document:
    return Document(
        key=str(index),
        seed=0,
        student_ids_S=student.ids_S,
        teacher_ids_T=teacher.ids_S,
        parts_Q2=student.parts_Q2,
    )


def _present(folder: Path, split: str, known: EncoderLanguages) -> list[str]:
    """The languages that a folder has lines in and the encoder knows."""
    return sorted(filter(known.knows, {*_codes(folder, split)}))


def _codes(folder: Path, split: str) -> Iterator[str]:
    names = {path.name for path in (folder / split).glob(f"*{split}*")}
    codes = {name.removesuffix(f".{split}").removeprefix(f"{split}.") for name in names}
    return filter(is_well_formed, codes)


def _path(folder: Path, split: str, language: str) -> Path:
    candidates = [folder / split / name for name in (f"{language}.{split}", f"{split}.{language}")]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(
        f"probe.folder: there is neither {candidates[0]} nor {candidates[1].name} beside it"
    )


def _read(path: Path) -> list[str]:
    """A file's lines. Raises: ValueError: It is not UTF-8, or a line is blank, which has no
    translation.
    """
    try:
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"probe.folder: {path} is not UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"probe.folder: {path}, line {number} is blank")
    return lines
