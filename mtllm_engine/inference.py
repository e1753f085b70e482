"""What was trained, used: vectors and answers of texts in any language that the encoder reads.

model = MTLLM.from_pretrained("runs/stage2")
model.encode(["Habari ya dunia"], language="swh_Latn")        # float32 (1, D)
"""

import contextlib
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from mtllm_engine import tasks
from mtllm_engine.data.annotations import NO_ANNOTATIONS, Annotations
from mtllm_engine.data.batch import Batch, Document, collate
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.files import expanded_path
from mtllm_engine.kernels.rms_norm import rms_norm
from mtllm_engine.languages import ENGLISH, NAMES, check_language, nearest
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.model.licences import licences_of
from mtllm_engine.model.lora import LoraLinear
from mtllm_engine.model.objective import best_answers, build_head
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.sums import AdapterSum, lora_of, sum_of
from mtllm_engine.model.tensors import check_finite
from mtllm_engine.model.weights import (
    ADAPTERS,
    PROJECTION_FILE,
    checkpoint_tensors,
    file_of,
    saved_name,
)
from mtllm_engine.progress import Bar
from mtllm_engine.tasks import belebele, xquad
from mtllm_engine.training.checkpoint import EARLIER
from mtllm_engine.training.engine import shard
from mtllm_engine.training.origins import check_origin, check_origins
from mtllm_engine.training.trained import (
    Head,
    Trained,
    checkpoint_in,
    find_trained,
    head_of,
    task_of,
)
from mtllm_engine.world import World, device_type

WINDOW = 4096  # texts that are sorted by length together; while they are read, the next are cut up
MAX_TOKENS = 4096  # of a batch: on a CPU more is no faster, and takes memory
DTYPES, QUANTIZATIONS = ("bfloat16", "float32"), ("none", "fp8", "nf4")
NAME = re.compile(r"[A-Za-z0-9_-]+")
Text = str | tuple[str, str]
"""A text, or the two of a task that compares two."""
Languages = str | Sequence[str] | None
"""Of all texts, or of each."""


class Classified(NamedTuple):
    """The classes of N texts."""

    labels: list[str]
    probabilities: np.ndarray  # float32 (N, Y)
    names: tuple[str, ...]  # of the Y classes


class Chosen(NamedTuple):
    """One of several choices."""

    index: int
    probabilities: np.ndarray  # float32 (Y,)


class MTLLM:
    """A stack to use. Several threads may call it at once, but for `add_task`.

    Attributes:
        trained: What was loaded.
        cut: How many texts until now were longer than `data.max_length`, and read up to there.
    """

    def __init__(self, trained: Trained, stack: Stack, device: torch.device) -> None:
        self.trained, self.stack, self.device = trained, stack.eval(), device
        student = build_tokenizer(trained.config, stack)
        self._sides = {
            "student": _Side("student", student, "student"),
            "teacher": _Side("teacher", student.read_by("llm"), stack.teacher),
        }
        self._tasks: dict[str, _Task] = {}
        self._lock, self.cut = threading.Lock(), 0

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: Literal["bfloat16", "float32"] | None = None,
        quantization: Literal["none", "fp8", "nf4"] | None = None,
        encoder: str = "",
        decoder: str = "",
        merged: str | Sequence[str] = (),
    ) -> "MTLLM":
        """A run, a checkpoint of one, a sum, a recipe's folder, an exported folder, or a hub id of
        one, ready to read.

        Args:
            device: By default a GPU where there is one.
            dtype, quantization: Of the frozen weights, by default as in training.
            encoder, decoder: The models that it was trained with, where they lie elsewhere now.
            merged: Likewise all adapters of `model.adapters`.

        Raises:
            ValueError: There is no such thing, it has no projection, or it is damaged or does not
                fit its models.
        """
        for value, known in ((dtype, DTYPES), (quantization, QUANTIZATIONS)):
            if value not in (None, *known):
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        merged = [merged] if merged and isinstance(merged, str) else merged
        trained = find_trained(name, encoder=encoder, decoder=decoder, merged=merged)
        if trained.is_exported and (encoder or decoder or merged):
            fix = "leave out encoder=, decoder= and merged="
            raise ValueError(f"{name} has its own encoder and LLM; {fix}")
        if not trained.reads_stack:
            fix = "load the stage 1 of its LLM, and give it this with add_task"
            raise ValueError(f"{name} is a fine-tuned LLM without a projection; {fix}")
        model = trained.config.model
        kept = {"dtype": dtype or model.dtype, "quantization": quantization or model.quantization}
        config = replace(trained.config, model=replace(model, **kept))
        trained = replace(trained, config=config)
        if trained.without_teacher:  # which vectors of the student need not
            config = replace(config, model=replace(config.model, teacher=""))
        if not trained.is_exported:
            check_origins(config)
        device = _device(device or device_type())
        stack, weights = build_stack(config, learns=False, device=device.type)
        world = World(rank=0, size=1, local_rank=0, device=device)
        loaded = cls(trained, shard(stack, weights, config, world), device)
        if trained.head:
            loaded._know(trained.task or "task", trained.head, trained.student, "student")
        for task, folder in trained.tasks.items():
            loaded.add_task(task, folder, labels=trained.record["tasks"][task]["labels"])
        return loaded

    @property
    def languages(self) -> tuple[str, ...]:
        """The codes of the languages that it reads; where the encoder takes no language's token,
        those that it was trained on: it reads any."""
        known = self._sides["student"].tokenizer.languages
        return known.readable(self.trained.config.languages.fallback)

    @property
    def licences(self) -> dict[str, str]:
        """Of the models that it is made of, by their names."""
        about = self.trained.record.get("about", {})
        return about.get("licences") or licences_of(self.trained.config)

    @property
    def tasks(self) -> dict[str, Head]:
        """What may be asked of a text, by the tasks' names."""
        return {name: task.head for name, task in self._tasks.items()}

    def encode(
        self,
        texts: Sequence[str],
        language: Languages = None,
        *,
        reader: Literal["student", "teacher"] = "student",
        normalize: bool = False,
        max_tokens: int = MAX_TOKENS,
        progress: bool | None = None,
    ) -> np.ndarray:
        """The pooled states of texts, float32 (N, D), in their order.

        Args:
            language: The teacher needs none.
            reader: "student": the stack. "teacher": what it learned to be like, that is the LLM on
                its own tokens: the bare one after stage 1, the fine-tuned one after stage 2.
                English that it reads and foreign text that the stack reads meet in one space.
            normalize: To length 1.
            max_tokens: Of a batch.
            progress: Whether a bar is shown; None: where somebody looks, after two seconds.

        Raises:
            ValueError: A text is none, or its language is none of `languages`.
        """
        if reader not in self._sides:
            raise ValueError(f'reader must be "student" or "teacher", not {reader!r}')
        if reader == "teacher" and self.trained.without_teacher:
            raise ValueError(f'reader="teacher": {self.trained.without_teacher}')
        side = self._sides[reader]
        asked = self._ask(texts, language, side)
        vectors_ND = np.zeros((len(asked), self._width), np.float32)

        def pool(batch: Batch, hidden_SD: torch.Tensor) -> torch.Tensor:
            return self.stack.objective.pool(hidden_SD, getattr(batch, f"{reader}_spans"))

        for places_N, _, pooled_ND in self._read(asked, side, pool, max_tokens, progress):
            vectors_ND[places_N] = pooled_ND
        if normalize:
            norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
            vectors_ND /= np.maximum(norms_N1, np.finfo(np.float32).tiny)
        return vectors_ND

    def classify(
        self,
        texts: Sequence[Text],
        language: Languages = None,
        *,
        task: str = "",
        max_tokens: int = MAX_TOKENS,
        progress: bool | None = None,
    ) -> Classified:
        """The classes of texts, or of pairs of texts where a task compares two.

        Args:
            task: One of `tasks`; by default the only one.

        Raises:
            ValueError: There is no such task, its answers are no classes, or as `encode`.
        """
        known = self._task(task, "classification")
        asked = self._ask(texts, language, self._sides["student"])
        scores_NY = self._scores(asked, known, max_tokens, progress)
        labels = [known.head.labels[index] for index in scores_NY.argmax(1)]
        return Classified(labels, _softmax(scores_NY), known.head.labels)

    def choose(
        self,
        passage: str,
        question: str,
        choices: Sequence[str],
        language: str | None = None,
        *,
        task: str = "",
    ) -> Chosen:
        """Which of some choices answers a question about a passage, in Belebele's form.

        Raises:
            ValueError: As `classify`, or there are more choices than the task has.
        """
        known = self._task(task, "choice")
        if not 1 <= len(choices) <= known.head.num_outputs:
            allowed = f"the task takes 1 to {known.head.num_outputs}"
            raise ValueError(f"there are {len(choices)} choices; {allowed}")
        example = belebele.compose("0", passage, question, choices, -1)
        asked = self._ask([example.text], language, self._sides["student"], example)
        (scores_Y,) = self._scores(asked, known, MAX_TOKENS, None)
        probabilities_Y = _softmax(scores_Y[: len(choices)])
        return Chosen(int(probabilities_Y.argmax()), probabilities_Y)

    def answer(
        self, question: str, passage: str, language: str | None = None, *, task: str = ""
    ) -> str:
        """The piece of a passage that answers a question, in XQuAD's form.

        Raises:
            ValueError: As `classify`.
        """
        known = self._task(task, "span")
        example = xquad.compose("0", question, passage)
        side = replace(self._sides["student"], adapters=known.adapters)
        asked = self._ask([example.text], language, side, example)

        def find(batch: Batch, hidden_SD: torch.Tensor) -> torch.Tensor:
            objective = self.stack.objective
            normed_SD, _ = rms_norm(hidden_SD, objective.norm, objective.eps)
            return best_answers(known.module(normed_SD), batch.student_spans)

        ((_, (document,), ((first, last),)),) = self._read(asked, side, find, MAX_TOKENS, None)
        characters = document.student_offsets_S2[first : last + 1].ravel()
        return example.text[characters[0] : characters[-1]].strip()

    def add_task(self, name: str, adapter: str | Path, *, labels: Sequence[str] = ()) -> None:
        """Makes a stack that knows no task answer one more, by the sum of its adapters and those of
        an LLM that was fine-tuned for it, with that LLM's head. Nothing is trained, and the base is
        held once however many tasks there are.

        Args:
            name: How it is asked for.
            adapter: A run of `mtllm finetune` or a checkpoint of it, or a folder of PEFT's with a
                `head.safetensors`, whose tensor "head.weight" has a row of D numbers a class.
            labels: Of the classes, where neither the run nor a task family's name says.

        Raises:
            ValueError: There is no head or no adapters, they are for another LLM, the name is taken
                or none, or this stack was itself trained for a task.
        """
        if self.trained.head:
            fix = "tasks are added to a stack of stage 1: load that"
            raise ValueError(f"{self.trained.name} was trained for a task itself; {fix}")
        if name in self._tasks or not NAME.fullmatch(name):
            wrong = "is taken" if name in self._tasks else "must be letters, digits, - and _"
            raise ValueError(f"the task's name {name!r} {wrong}")
        folder = checkpoint_in(expanded_path(str(adapter)))
        if (folder / PROJECTION_FILE).is_file():
            fix = "name the run of `mtllm finetune` that it learned from"
            raise ValueError(f"{folder} is a stack itself, with a projection; {fix}")
        head = head_of(folder, task_of(folder) or name, labels)
        if head is None:
            fix = "it takes a run of `mtllm finetune`, or that file beside PEFT's own"
            raise ValueError(f"{folder} has no head.safetensors; {fix}")
        self._check_base(folder)
        self._know(name, head, folder, f"task_{name}")
        try:
            self._add_sum(f"task_{name}", folder)
        except ValueError:
            self._forget(name)
            raise

    @property
    def _width(self) -> int:
        return len(self.stack.objective.norm)

    def _ask(
        self,
        texts: Sequence[Text],
        language: Languages,
        side: "_Side",
        annotations: Annotations = NO_ANNOTATIONS,
    ) -> "list[_Asked]":
        """All that is asked for, found to be right before anything is read."""
        if isinstance(texts, str):
            raise ValueError("texts is a single text; write a list: [text]")
        texts = list(texts)
        is_one = language is None or isinstance(language, str)
        each = [language] * len(texts) if is_one else list(language)
        if len(each) != len(texts):
            raise ValueError(f"there are {len(texts)} texts and {len(each)} languages")
        given = {code: self._given(code) if side.name == "student" else "" for code in {*each}}
        return [
            _checked(number, text, given[code], annotations)
            for number, (text, code) in enumerate(zip(texts, each))
        ]

    def _given(self, language: str | None) -> str:
        """What the encoder is given for a language.

        Raises:
            ValueError: There is none, or the encoder does not know it.
        """
        known = self._sides["student"].tokenizer.languages
        language = language or self.trained.record.get("default_language")
        if not language and not known.is_told:
            return ENGLISH  # as well as any
        if not language:
            raise ValueError('say which language the texts are in, such as language="swh_Latn"')
        given = known.resolve(language, self.trained.config.languages.fallback).given
        if given is None:
            if language not in NAMES:
                check_language(language, self.languages)
            near = ", ".join(nearest(language, self.languages))
            raise ValueError(f"the encoder has no token for {language}; the nearest are {near}")
        return given

    def _scores(
        self, asked: "list[_Asked]", task: "_Task", max_tokens: int, progress: bool | None
    ) -> np.ndarray:
        """float32 (N, Y)."""
        side = replace(self._sides["student"], adapters=task.adapters)
        scores_NY = np.zeros((len(asked), task.head.num_outputs), np.float32)

        def score(batch: Batch, hidden_SD: torch.Tensor) -> torch.Tensor:
            return task.module(self.stack.objective.pool(hidden_SD, batch.student_spans), batch)

        for places_N, _, scored_NY in self._read(asked, side, score, max_tokens, progress):
            scores_NY[places_N] = scored_NY
        return scores_NY

    def _read(
        self,
        asked: "list[_Asked]",
        side: "_Side",
        finish: Callable[[Batch, torch.Tensor], torch.Tensor],
        max_tokens: int,
        progress: bool | None,
    ) -> Iterator[tuple[list[int], list[Document], np.ndarray]]:
        """The places in `asked` of a batch's documents, these, and what `finish` makes of their
        states, a row a document; batch after batch, texts of about one length together.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        windows = [asked[start : start + WINDOW] for start in range(0, len(asked), WINDOW)]
        quiet = None if progress is None else not progress
        options = {"delay": 2 if progress is None else 0, "disable": quiet, "unit": "text"}
        with (
            Bar(total=len(asked), desc="reading", **options) as bar,
            ThreadPoolExecutor(max_workers=1) as ahead,
        ):
            coming = [ahead.submit(side.documents, window) for window in windows[:1]]
            for number in range(len(windows)):
                documents = coming[number].result()
                if number + 1 < len(windows):
                    first = (number + 1) * WINDOW
                    coming.append(ahead.submit(side.documents, windows[number + 1], first))
                coming[number] = None
                self._count(documents)
                for places in _batches(documents, max_tokens):
                    batch = [documents[place].document for place in places]
                    rows = self._forward(batch, side, finish)
                    yield [number * WINDOW + place for place in places], batch, rows
                    bar.update(len(places))

    @torch.inference_mode()
    def _forward(
        self,
        documents: Sequence[Document],
        side: "_Side",
        finish: Callable[[Batch, torch.Tensor], torch.Tensor],
    ) -> np.ndarray:
        is_cuda = self.device.type == "cuda"
        with torch.cuda.device(self.device) if is_cuda else contextlib.nullcontext():
            batch = collate(documents, step_seed=0, device=self.device)
            hidden_SD = self.stack.read(batch, side=side.name, adapters=side.adapters)
            return finish(batch, hidden_SD).cpu().numpy()

    def _count(self, documents: "Sequence[_Tokenised]") -> None:
        with self._lock:
            self.cut += sum(document.is_cut for document in documents)

    def _task(self, name: str, kind: str) -> "_Task":
        """Raises: ValueError: There is no such task, or its head is of another kind."""
        has = ", ".join(f"{known} ({task.head.kind})" for known, task in self._tasks.items())
        if not has:
            fix = "use encode, or fine-tune"
            raise ValueError(f"{self.trained.name} is stage 1 only and answers no task; {fix}")
        has = f"{self.trained.name} has {has}"
        if not name and len(self._tasks) != 1:
            raise ValueError(f"task= says which task: {has}")
        task = self._tasks.get(name or next(iter(self._tasks)))
        if task is None:
            raise ValueError(f"there is no task {name!r}: {has}")
        if task.head.kind != kind:
            raise ValueError(f"this asks for a task whose head is of the kind {kind}: {has}")
        return task

    def _know(self, name: str, head: Head, folder: Path, adapters: str) -> None:
        tensors = checkpoint_tensors(folder)
        module = build_head(self._width, (head.kind, head.num_outputs))
        shape, wanted = tensors.shape("head.weight"), tuple(module.weight.shape)
        if shape != wanted:
            raise ValueError(f"{folder}: head.weight is {shape}; for this LLM it must be {wanted}")
        weight = tensors.read("head.weight", 0, math.prod(shape)).view(shape).float()
        module.weight = nn.Parameter(check_finite(weight, folder, "head.weight"), False)
        self._tasks[name] = _Task(head, module.to(self.device), adapters)

    def _forget(self, name: str) -> None:
        """Takes back a task whose adapters could not be added, and those of them that were."""
        adapters = self._tasks.pop(name).adapters
        for linear in self._linears.values():
            if hasattr(linear, adapters):
                delattr(linear, adapters)

    def _check_base(self, folder: Path) -> None:
        """Raises: ValueError: The adapters were trained on another LLM, or another attention."""
        trained = self.trained
        if trained.is_exported:  # its models have other files than they had in training
            keys = ("model.causal", "model.decoder", "model.adapters")
            current = {key: (EARLIER | trained.record["identity"])[key] for key in keys}
            if (folder / "state.json").exists():
                check_origin(folder, current, dict.fromkeys(keys, f"that of {trained.name}"))
            return
        objective = replace(trained.config.objective, reader="llm")
        model = replace(trained.config.model, init_from=(str(folder),), teacher="")
        check_origins(replace(trained.config, model=model, objective=objective))

    def _add_sum(self, name: str, folder: Path) -> None:
        """One more set of adapters for the LLM: the student's, where these are not in its weights,
        and those of a folder, added up.
        """
        folders = [folder] if self.trained.is_merged else [self.trained.student, folder]
        lora = sum_of([lora_of(each) for each in folders])
        total = AdapterSum(list(map(checkpoint_tensors, folders)), scale=lora.scale, seed=None)
        left = {saved for saved in total.names if file_of(saved) == ADAPTERS}
        for path, linear in self._linears.items():
            for member, adapter in linear.add(name, lora).eval().items():
                for matrix, parameter in list(adapter.named_parameters()):
                    saved = saved_name(f"decoder.{path}.student.{member}.{matrix}")
                    shape, wanted = total.shape(saved), tuple(parameter.shape)
                    if shape != wanted:
                        ours = f"for this LLM it must be {wanted}"
                        raise ValueError(f"{folder}: {saved} adds up to {shape}; {ours}")
                    value = total.read(saved, 0, math.prod(shape)).view(shape)
                    setattr(adapter, matrix, nn.Parameter(value.to(self.device), False))
                    left.discard(saved)
        if left:
            raise ValueError(f"{folder}: this LLM has no linear for {min(left)}; it is of another")

    @property
    def _linears(self) -> dict[str, LoraLinear]:
        """The LLM's, by their path in it."""
        named = self.stack.decoder.named_modules()
        return {path: each for path, each in named if isinstance(each, LoraLinear)}


@dataclass(frozen=True)
class _Asked:
    """A text to be read."""

    text: str
    language: str  # that the encoder is given
    annotations: Annotations


@dataclass(frozen=True)
class _Tokenised:
    document: Document
    is_cut: bool


@dataclass(frozen=True)
class _Task:
    """A task that is known: its head, and the adapters that run for it."""

    head: Head
    module: nn.Module
    adapters: str


@dataclass(frozen=True)
class _Side:
    """Who reads: their tokenizer, and the LLM's adapters that run."""

    name: Literal["student", "teacher"]
    tokenizer: PairTokenizer
    adapters: str | None

    def documents(self, asked: Sequence[_Asked], first: int = 0) -> list[_Tokenised]:
        """Args: first: The number of the first text.

        Raises:
            ValueError: A text cannot be made short enough.
        """
        documents = []
        for number, each in enumerate(asked, start=first):
            try:
                documents.append(self._document(each))
            except ValueError as error:
                raise ValueError(f"texts[{number}]: {error}") from None
        return documents

    def _document(self, asked: _Asked) -> _Tokenised:
        read, _ = self.tokenizer.example(asked.text, asked.language, asked.annotations)
        document = Document(
            key="",
            seed=0,
            student_ids_S=read.ids_S,
            teacher_ids_T=read.ids_S,
            student_spans_P2=read.spans_P2,
            teacher_spans_P2=read.spans_P2,
            student_offsets_S2=read.offsets_S2,
            parts_Q2=read.parts_Q2,
        )
        return _Tokenised(document, read.is_cut)


def _device(name: str | torch.device) -> torch.device:
    """Raises: ValueError: There is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError('there is no GPU that torch sees; use device="cpu"')
    return device


def _checked(number: int, text: Text, language: str, annotations: Annotations) -> _Asked:
    """Raises: ValueError: It is no text."""
    if isinstance(text, tuple) and len(text) == 2 and all(isinstance(each, str) for each in text):
        text, first = tasks.join(*text)
        annotations = Annotations(cut=first)
    if not isinstance(text, str):
        raise ValueError(f"texts[{number}] is no text: it is of type {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"texts[{number}] is not Unicode: {error.reason}"
        raise ValueError(f"{wrong}; decode its bytes as UTF-8") from None
    return _Asked(text, language, annotations)


def _batches(documents: Sequence[_Tokenised], max_tokens: int) -> Iterator[list[int]]:
    """Numbers of documents that are read together, the longest first; one alone may be longer than
    `max_tokens`.
    """
    lengths = [each.document.num_tokens for each in documents]
    batch: list[int] = []
    room = max_tokens
    for number in sorted(range(len(documents)), key=lambda number: -lengths[number]):
        if batch and lengths[number] > room:
            yield batch
            batch, room = [], max_tokens
        batch.append(number)
        room -= lengths[number]
    if batch:
        yield batch


def _softmax(scores: np.ndarray) -> np.ndarray:
    """float32, over the last dimension."""
    return torch.from_numpy(scores).double().softmax(-1).float().numpy()
