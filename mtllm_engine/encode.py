"""Vectors and labels of the texts of a file: `mtllm encode` and `mtllm classify`.

A chunk of texts is read, and its result written, whole and for good, beside the file that all shall
be joined into. So nothing grows with the number of texts, and the same command given again goes on:
it leaves out the chunks whose results it finds. Of several ranks each makes every so-manyth chunk.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from mtllm_engine import files
from mtllm_engine.data.sources import STANDARD_INPUT, read_texts
from mtllm_engine.progress import Bar

if TYPE_CHECKING:  # torch is imported where it is needed: `mtllm --help` is not
    from mtllm_engine.inference import MTLLM, Classified
    from mtllm_engine.world import World

CHUNK_TEXTS = 4096
CHUNK_CHARACTERS = 1 << 22
"""A chunk ends with the text that reaches either."""
ENDINGS = {"encode": (".npy", ".parquet"), "classify": (".jsonl", ".parquet")}
PART = re.compile(r"(\d{8}-[0-9a-f]{32})-(\d+)(\.\w+)")
"""A finished chunk: its number and the digest of all that its result depends on, how many of its
texts were cut, and the ending of what it becomes a part of."""
WEEK_S = 7 * 24 * 3600.0
"""Ranks wait for one another only when all is done."""

Text = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    command: Literal["encode", "classify"]
    source: str
    """A file, or `-`."""
    model: str
    encoder: str = ""
    decoder: str = ""
    """The models that it was trained with, where they lie elsewhere now."""
    merged: Sequence[str] = ()
    """Likewise the adapters of `model.adapters`."""
    language: str | None = None
    fields: Sequence[str] = ("text",)
    """Two, where a task compares two texts."""
    out: str = ""
    """A file that is not there; empty: the terminal."""
    device: str | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    max_tokens: int = 4096
    reader: Literal["student", "teacher"] = "student"
    normalize: bool = False
    task: str = ""
    adapters: Sequence[tuple[str, str]] = ()
    """Names and checkpoints of tasks that are added."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Request":
        """From what has been typed, by name, other options aside."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in names})

    def check(self, ranks: int) -> None:
        """Raises: ValueError: It cannot be done, as far as that is seen without a model."""
        out, endings = Path(self.out), ENDINGS[self.command]
        if ranks < 1:
            raise ValueError(f"--gpus must be at least 1, not {ranks}")
        if ranks > 1 and self.source == STANDARD_INPUT:
            fix = "write it into a file, or leave out --gpus"
            raise ValueError(f"standard input goes to one rank and cannot be shared; {fix}")
        if ranks > 1 and not self.out:
            raise ValueError("several ranks write into a file; name one with --out")
        if self.out and out.suffix not in endings:
            raise ValueError(f"--out {out} must end in {' or '.join(endings)}")
        if self.out and out.exists():
            raise ValueError(f"{out} is there already; name another --out")
        if not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent} for --out; make it")
        is_lines = self.source == STANDARD_INPUT or ".txt" in Path(self.source).suffixes
        if len(self.fields) > 1 and is_lines:
            fix = "two fields are read of JSON Lines or Parquet"
            raise ValueError(f"{self.source} has one text a line; {fix}")

    def chunks(self) -> Iterator[list[Text]]:
        """The texts, in their order; a chunk without any, where there are none."""
        columns = [read_texts(self.source, field) for field in self.fields]
        texts: Iterator[Text] = columns[0] if len(columns) == 1 else zip(*columns)
        chunk: list[Text] = []
        count = characters = 0
        for text in texts:
            chunk.append(text)
            count, characters = count + 1, characters + sum(map(len, text))
            if len(chunk) >= CHUNK_TEXTS or characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
        if chunk or not count:
            yield chunk

    @property
    def identity(self) -> str:
        """A digest of all but the texts that the result depends on: not of the device, nor of the
        size of a batch, so that what was too large for one is continued with another.

        Raises:
            ValueError: There is no such model or task.
        """
        from mtllm_engine.model.peft import FILE
        from mtllm_engine.model.weights import RUN_FILES
        from mtllm_engine.training.trained import checkpoint_in, find_trained

        settings = {key: value for key, value in asdict(self).items() if key in SETTINGS}
        for _, name in self.adapters:
            folder = checkpoint_in(Path(files.expand(name)))
            paths = [path for each in (*RUN_FILES, FILE) if (path := folder / each).is_file()]
            settings[name] = [files.sha256_of(path) for path in paths]
        return json.dumps([find_trained(self.model, **self._places).identity, settings])

    def found(self) -> str:
        """The folder that the model's name means now.

        Raises:
            ValueError: There is none.
        """
        from mtllm_engine.training.trained import find_trained

        return str(find_trained(self.model, **self._places).folder)

    @property
    def _places(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "decoder": self.decoder, "merged": self.merged}

    def load(self, world: "World") -> "MTLLM":
        """Raises: ValueError: As `MTLLM.from_pretrained` and `MTLLM.add_task`."""
        from mtllm_engine.inference import MTLLM

        device = self.device if self.device == "cpu" else world.device
        options = {"device": device, "dtype": self.dtype, **self._places}
        model = MTLLM.from_pretrained(self.model, **options)
        for name, checkpoint in self.adapters:
            model.add_task(name, files.expand(checkpoint))
        return model

    def answer(self, model: "MTLLM", texts: Sequence[Text]) -> "np.ndarray | Classified":
        """The vectors, or the classes, of a chunk."""
        options: dict[str, Any] = {"max_tokens": self.max_tokens, "progress": False}
        try:
            if self.command == "classify":
                return model.classify(texts, self.language, task=self.task, **options)
            options |= {"reader": self.reader, "normalize": self.normalize}
            return model.encode(texts, self.language, **options)
        except ValueError as error:
            message = str(error)
            for python, typed in TYPED.items():
                message = message.replace(python, typed)
            raise ValueError(message) from error


SETTINGS = ("command", "language", "dtype", "reader", "normalize", "task", "adapters")
"""What of a request its result depends on besides the texts and the models."""
TYPED = {
    'language="swh_Latn"': "--language swh_Latn",
    "task= says": "--task says",
    "max_tokens must": "--max-tokens must",
}
"""How that is typed which errors ask for in Python."""


def run(request: Request, world: "World") -> None:
    """Answers a request, or what of it has not been answered yet, on all ranks.

    Raises:
        ValueError: A text, the language or the model is no such thing.
        OSError: What was asked for could not be written; finished chunks are kept.
    """
    # What is wrong with the last text is said before the first is read.
    is_file = request.source != STANDARD_INPUT
    total = world.on_main(lambda: sum(map(len, request.chunks()))) if is_file else None
    # All ranks, and all that follows, mean the same checkpoint, whatever is saved meanwhile.
    request = replace(request, model=world.on_main(lambda: request.found()))
    if not request.out:
        return _print(request, world)
    parts = Parts(Path(request.out), world.on_main(lambda: request.identity))
    with contextlib.ExitStack() as claims:
        world.on_main(lambda: claims.enter_context(parts.claimed()))
        _make(request, parts, world, total)


def _make(request: Request, parts: "Parts", world: "World", total: int | None) -> None:
    """Makes the chunks that are not there, and joins them."""
    try:
        done = world.together(lambda: _answer(request, parts, world, total))
    except ValueError:
        parts.remove_empty()
        raise
    texts, seconds = sum(world.gather(done.texts)), max(world.gather(done.seconds))
    cut = world.on_main(lambda: parts.join(done.names))
    if world.is_main:
        earlier = f", {done.total - texts:,} of them before" if texts < done.total else ""
        speed = f", {texts / seconds:,.1f} texts/s" if texts else ""
        print(f"{request.out}: {done.total:,} texts{earlier}, {cut:,} cut{speed}")


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What a rank has seen and done."""

    names: list[str]  # of all chunks, whoever made them
    total: int  # of their texts
    texts: int  # that this rank read, and in which time
    seconds: float


def _answer(request: Request, parts: "Parts", world: "World", total: int | None) -> _Done:
    """Makes what is this rank's and is not there."""
    there, model = parts.found(), None
    names, num_seen, num_texts, seconds = [], 0, 0, 0.0
    bar = Bar(total=total, desc="texts", unit="text", disable=not world.is_main)
    with bar:
        for number, texts in enumerate(request.chunks()):
            names.append(parts.name(number, texts))
            if number % world.size == world.rank and names[-1] not in there:
                model = model or request.load(world)
                before, start_s = model.cut, time.perf_counter()
                answer = request.answer(model, texts)
                num_texts, seconds = num_texts + len(texts), seconds + time.perf_counter() - start_s
                parts.write(names[-1], model.cut - before, texts, answer)
            num_seen += len(texts)
            bar.update(len(texts))
    return _Done(names=names, total=num_seen, texts=num_texts, seconds=seconds)


def _print(request: Request, world: "World") -> None:
    """Labels, their probabilities and texts, a line each."""
    model = request.load(world)
    for texts in request.chunks():
        labels, probabilities_NY, _ = request.answer(model, texts)
        for text, label, probability in zip(texts, labels, probabilities_NY.max(1)):
            columns = (text,) if isinstance(text, str) else text
            shown = [" ".join(column.split()) for column in columns]
            print(label, f"{probability:.4f}", *shown, sep="\t")
        sys.stdout.flush()


class Parts:
    """The finished chunks beside a file that they will be joined into: `OUT.parts`.

    Args:
        identity: Of what their results depend on, besides their texts.
    """

    def __init__(self, out: Path, identity: str) -> None:
        self.out, self.identity = out, identity
        self.folder = out.with_name(f"{out.name}.parts")
        self._write, self._join = FORMATS[out.suffix]

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the folder, and meanwhile keeps others out of it.

        Raises:
            ValueError: Another process is at work in it.
        """
        with self._kept():
            self.folder.mkdir(exist_ok=True)
            claim = os.open(self.folder, os.O_RDONLY)
        try:
            self._lock(claim)
            yield
        finally:
            os.close(claim)

    def _lock(self, claim: int) -> None:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another command is writing {self.out}; wait for it") from None

    def name(self, number: int, texts: Sequence[Text]) -> str:
        """What a chunk is called that has these texts, if nothing else is changed."""
        content = json.dumps([self.identity, texts]).encode()
        return f"{number:08d}-{hashlib.blake2b(content, digest_size=16).hexdigest()}"

    def found(self) -> dict[str, tuple[int, Path]]:
        """How many texts were cut in each that is there, by its name, and its file."""
        found = {}
        for path in self.folder.iterdir():
            match = PART.fullmatch(path.name)
            if match and match[3] == self.out.suffix:
                found[match[1]] = (int(match[2]), path)
        return found

    def write(
        self, name: str, cut: int, texts: Sequence[Text], answer: "np.ndarray | Classified"
    ) -> None:
        path = self.folder / f"{name}-{cut}{self.out.suffix}"
        with self._kept(), files.atomic_file(path) as file:
            self._write(file, texts, answer)

    def join(self, names: Sequence[str]) -> int:
        """Makes the file of chunks and removes them, and those of other requests; returns how many
        of their texts were cut.

        Raises:
            ValueError: Ranks have read different texts.
        """
        found = self.found()
        if not found.keys() >= set(names):
            changed = "the input has changed while it was read"
            raise ValueError(f"{self.out} is not made: {changed}; give the command again")
        counts, paths = zip(*(found[name] for name in names))
        # Made in their folder, where what a killed process leaves is in nobody's way.
        joined = self.folder / self.out.name
        with self._kept():
            with files.atomic_file(joined) as file:
                self._join(file, paths)
            joined.replace(self.out)
            files.sync_folder(self.out.parent)
        for path in self.folder.iterdir():
            if PART.search(path.name) or path.suffix == ".partial":
                path.unlink()
        self.remove_empty()
        return sum(counts)

    def remove_empty(self) -> None:
        """Nothing, where something lies in the folder."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"what is finished is kept in {self.folder}" if self.folder.is_dir() else ""
            fix = f"{kept}: mend that and give the command again" if kept else "name another --out"
            raise OSError(f"cannot write {self.out}: {error.strerror or error}; {fix}") from error


def _write_array(file: BinaryIO, _: Sequence[Text], vectors_ND: np.ndarray) -> None:
    np.lib.format.write_array(file, np.ascontiguousarray(vectors_ND, np.float32), version=(1, 0))


def _join_arrays(file: BinaryIO, paths: Sequence[Path]) -> None:
    shapes = []
    for path in paths:
        with path.open("rb") as part:
            shapes.append(_read_shape(part))
    shape = (sum(count for count, _ in shapes), shapes[0][1])
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for path in paths:
        with path.open("rb") as part:
            _read_shape(part)
            shutil.copyfileobj(part, file)


def _read_shape(part: BinaryIO) -> tuple[int, int]:
    """Of an array's file, which is then at its values."""
    np.lib.format.read_magic(part)
    return np.lib.format.read_array_header_1_0(part)[0]


def _write_lines(file: BinaryIO, _: Sequence[Text], answer: "Classified") -> None:
    for label, row_Y in zip(answer.labels, answer.probabilities):
        # A float32 in the fewest digits that say which it is.
        probabilities = {name: float(str(each)) for name, each in zip(answer.names, row_Y)}
        row = {"label": label, "probabilities": probabilities}
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _join_lines(file: BinaryIO, paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as part:
            shutil.copyfileobj(part, file)


def _write_table(file: BinaryIO, texts: Sequence[Text], answer: "np.ndarray | Classified") -> None:
    import pyarrow
    import pyarrow.parquet

    if isinstance(answer, np.ndarray):
        flat = pyarrow.array(answer.reshape(-1))
        embeddings = pyarrow.FixedSizeListArray.from_arrays(flat, answer.shape[1])
        columns = {"text": pyarrow.array(texts, pyarrow.string()), "embedding": embeddings}
    else:
        scores = [pyarrow.array(column_N) for column_N in answer.probabilities.T]
        probabilities = pyarrow.StructArray.from_arrays(scores, names=answer.names)
        labels = pyarrow.array(answer.labels, pyarrow.string())
        columns = {"label": labels, "probabilities": probabilities}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def _join_tables(file: BinaryIO, paths: Sequence[Path]) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(file, parquet.read_schema(paths[0])) as writer:
        for path in paths:
            writer.write_table(parquet.read_table(path))


FORMATS: dict[str, tuple[Callable[..., None], Callable[[BinaryIO, Sequence[Path]], None]]] = {
    ".npy": (_write_array, _join_arrays),
    ".jsonl": (_write_lines, _join_lines),
    ".parquet": (_write_table, _join_tables),
}
"""How a chunk is written, and how chunks are joined, by a file's ending."""


def run_alone(request: Request) -> int:
    """A request on one device, in this process; returns the exit status."""
    import torch

    from mtllm_engine.world import World, device_type

    if request.device == "cuda" and device_type() != "cuda":
        raise ValueError("there is no GPU that torch sees; use --device cpu")
    device = torch.device(request.device or device_type())
    with _interruptible():
        run(request, World(rank=0, size=1, local_rank=0, device=device))
    return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends this process in order; what launches ranks has them ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the ranks, which `mtllm encode --gpus N` launches with a request as JSON."""
    from mtllm_engine.training.launch import launched_words, run_ranks

    words = launched_words(argv)
    if len(words) != 1 or not words[0].startswith("{"):
        print("usage: mtllm encode|classify INPUT --model X --out FILE --gpus N")
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    with _interruptible():
        return run_ranks(lambda: partial(run, Request(**json.loads(words[0]))), timeout_s=WEEK_S)


if __name__ == "__main__":
    sys.exit(main())
