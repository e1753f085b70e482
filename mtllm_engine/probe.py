"""The cross-lingual probe: during training, does the student read a foreign line as the teacher reads the English one?

Parallel lines as FLORES-200 publishes them. Every rank reads its share of the lines of each language; their states meet
in one table, of which every figure is computed, so nothing depends on how many ranks there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from mtllm_engine.config import Config
from mtllm_engine.data.batch import Document, Pack, Totals, collate, join
from mtllm_engine.data.languages import check_language, is_well_formed, nllb_token
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.engine import PlainEngine, ZeroEngine
from mtllm_engine.tasks import ENGLISH
from mtllm_engine.world import World


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well the student's states of foreign lines L agree with the teacher's of the English ones."""

    fvu: float
    cosine: float
    retrieval: float  # the share of lines whose own teacher state is the nearest of all lines', by cosine


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
        self.places = range(world.rank, len(english), world.size)  # this rank's
        limit, teacher = tokenizer.max_length, tokenizer.teacher
        ids = [teacher.ids(teacher.encode(english[place]), limit) for place in self.places]
        self.micro_batches: dict[str, list[list[Document]]] = {}
        for language, texts in lines.items():
            side = tokenizer.student(language)
            packs = [
                Pack(documents=(_document(side.ids(side.encode(texts[place]), limit), ids_T, place),), state={})
                for place, ids_T in zip(self.places, ids)
            ]
            self.micro_batches[language] = join(packs, config.memory.max_tokens)

    def __call__(self, engine: PlainEngine | ZeroEngine) -> dict[str, Agreement]:
        """Agreement by language, the same on every rank; all ranks call it."""
        counts = self.world.gather_ints([len(batches) for batches in self.micro_batches.values()])
        found = {}
        with engine.evaluating():
            for (language, batches), most in zip(self.micro_batches.items(), map(max, zip(*counts))):
                states = self._states(engine, batches, most)
                found[language] = measure(*states)
        return found

    def _states(
        self, engine: PlainEngine | ZeroEngine, micro_batches: Sequence[list[Document]], most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's and teacher's state of each line, fp32 (L, D): a row is one rank's, and zero on the others."""
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number in range(most):
            documents = micro_batches[number] if number < len(micro_batches) else []
            batch = collate(documents, step_seed=0, device=self.world.device)
            outputs = engine(batch, Totals(len(documents), len(documents))).outputs
            rows.append((outputs.student_PD[: len(documents)], outputs.teacher_PD[: len(documents)]))
        places = torch.tensor(self.places, device=self.world.device)
        student_LD, teacher_LD = (self._gathered(places, torch.cat(each)) for each in zip(*rows))
        return student_LD, teacher_LD

    def _gathered(self, places: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        table_LD = rows.new_zeros(self.num_lines, rows.shape[1])
        table_LD[places] = rows
        return self.world.sum(table_LD)


def open_probe(config: Config, world: World, tokenizer: PairTokenizer) -> Probe | None:
    """The probe that a configuration asks for, if it does.

    Raises:
        ValueError: A file is missing, or its lines are not parallel to the English ones; a language is unknown.
    """
    if not config.probe.folder:
        return None
    folder, split = Path(config.probe.folder).expanduser(), config.probe.split
    english = _read(_path(folder, split, ENGLISH))
    count = min(config.probe.lines or len(english), len(english))
    lines = {}
    for language in config.probe.languages or _present(folder, split, tokenizer):
        tokenizer.student(check_language(language))
        path = _path(folder, split, language)
        lines[language] = _read(path)
        if len(lines[language]) != len(english):
            told = f"{path} has {len(lines[language])} lines, the English file {len(english)}"
            raise ValueError(f"probe.folder: {told}: line i of one must translate line i of the other")
    if not set(lines) - {ENGLISH}:
        raise ValueError(f"probe.folder: {folder} has no language but English in {split} that the encoder knows")
    return Probe(config, world, tokenizer, english[:count], {key: texts[:count] for key, texts in lines.items()})


def measure(student_LD: torch.Tensor, teacher_LD: torch.Tensor) -> Agreement:
    """Line i of one is line i of the other. Of equally near teacher states the first counts as the nearest."""
    student_LD, teacher_LD = student_LD.double(), teacher_LD.double()
    variance = (teacher_LD - teacher_LD.mean(0)).square().sum().item()
    similarity_LL = functional.normalize(student_LD, dim=1) @ functional.normalize(teacher_LD, dim=1).T
    lines_L = torch.arange(len(student_LD), device=student_LD.device)
    return Agreement(
        fvu=(student_LD - teacher_LD).square().sum().item() / variance if variance > 0 else float("nan"),
        cosine=similarity_LL.diagonal().mean().item(),
        retrieval=(similarity_LL.argmax(1) == lines_L).double().mean().item(),
    )


def average(agreements: dict[str, Agreement]) -> Agreement:
    """The mean over languages but English, which training reads."""
    foreign = [each for language, each in agreements.items() if language != ENGLISH]
    return Agreement(
        **{name: float(np.mean([getattr(each, name) for each in foreign])) for name in Agreement.__annotations__}
    )


def _document(student_ids_S: np.ndarray, teacher_ids_T: np.ndarray, place: int) -> Document:
    return Document(key=str(place), seed=0, student_ids_S=student_ids_S, teacher_ids_T=teacher_ids_T)


def _present(folder: Path, split: str, tokenizer: PairTokenizer) -> list[str]:
    """The languages that a folder has lines in and the encoder a token for."""
    return sorted(code for code in _codes(folder, split) if nllb_token(code) in tokenizer.languages)


def _codes(folder: Path, split: str) -> Iterator[str]:
    names = {path.name for path in (folder / split).glob(f"*{split}*")}
    codes = {name.removesuffix(f".{split}").removeprefix(f"{split}.") for name in names}
    return filter(is_well_formed, codes)


def _path(folder: Path, split: str, language: str) -> Path:
    candidates = [folder / split / name for name in (f"{language}.{split}", f"{split}.{language}")]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(f"probe.folder: there is neither {candidates[0]} nor {candidates[1].name} beside it")


def _read(path: Path) -> list[str]:
    """A file's lines. Raises: ValueError: It is not UTF-8, or a line is blank, which has no translation."""
    try:
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"probe.folder: {path} is not UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"probe.folder: {path}, line {number} is blank")
    return lines
