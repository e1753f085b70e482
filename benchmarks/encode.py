"""Vectors of texts: ours beside what people use, all on one exported folder.

    mtllm export RUN --out DIR
    python -m benchmarks.encode DIR [--lengths 40,equal] [--texts 512] [--out encode.jsonl]

The others are transformers' classes with the folder's own code, texts as they come and sorted by
length, and sentence-transformers where it is installed; each at the fastest of several batch
sizes. All take turns, and all vectors must agree with ours, or there are no figures.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.documents import SIGMA
from benchmarks.measure import spread
from benchmarks.tables import draw as draw_bars
from benchmarks.tables import table
from mtllm_engine import MTLLM
from mtllm_engine.data.vocabulary import languages_of, load_tokenizer
from mtllm_engine.training.log import environment
from mtllm_engine.training.trained import ENCODER, find_trained
from mtllm_engine.world import World, device_type

BATCHES = (8, 16, 32, 64, 128)
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest number
EQUAL = "equal"
EQUAL_TOKENS = 64
WORD = "▁"  # SentencePiece's mark of a word's start
Row = dict[str, Any]
Encode = Callable[[Sequence[str], int], np.ndarray]
"""Texts and a batch size -> float32 (N, D)."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all variants are given."""

    folder: str
    language: str
    dtype: str
    device: str
    threads: int

    def build(self, name: str) -> Encode:
        """A variant, its model loaded."""
        torch.set_num_threads(self.threads)
        return VARIANTS[name](self)


def ours(setting: Setting) -> Encode:
    model = MTLLM.from_pretrained(setting.folder, device=setting.device, dtype=setting.dtype)
    return lambda texts, _: model.encode(texts, setting.language, progress=False)


def transformers_unsorted(setting: Setting) -> Encode:
    model = _auto_model(setting)

    @torch.inference_mode()
    def encode(texts: Sequence[str], batch_size: int) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), batch_size):
            inputs = model.tokenize(texts[start : start + batch_size], setting.language)
            inputs = {name: tensor.to(setting.device) for name, tensor in inputs.items()}
            rows.append(model(**inputs).pooler_output.float().cpu().numpy())
        return np.concatenate(rows)

    return encode


def transformers_sorted(setting: Setting) -> Encode:
    model = _auto_model(setting)
    return lambda texts, size: model.encode(texts, setting.language, batch_size=size)


def sentence_transformers(setting: Setting) -> Encode:
    sys.path.append(str(Path(sys.prefix, "sentence-transformers")))  # the Makefile puts it there
    from sentence_transformers import SentenceTransformer

    options = {"trust_remote_code": True, "model_kwargs": {"dtype": setting.dtype}}
    model = SentenceTransformer(setting.folder, device=setting.device, **options)
    common = {"language": setting.language, "show_progress_bar": False}
    return lambda texts, size: model.encode(list(texts), batch_size=size, **common)


VARIANTS: dict[str, Callable[[Setting], Encode]] = {
    "ours": ours,
    "transformers": transformers_unsorted,
    "transformers, sorted": transformers_sorted,
    "sentence-transformers": sentence_transformers,
}


def _auto_model(setting: Setting) -> Any:
    from transformers import AutoModel

    options = {"trust_remote_code": True, "dtype": getattr(torch, setting.dtype)}
    return AutoModel.from_pretrained(setting.folder, **options).to(setting.device)


def draw_texts(words: Sequence[str], lengths: str, count: int, longest: int) -> list[str]:
    """Texts of random words, which are a token each at least.

    Args:
        lengths: The median of a log-normal number of words, or "equal".
    """
    generator = np.random.default_rng(0)
    if lengths == EQUAL:
        sizes = np.full(count, min(EQUAL_TOKENS, longest))
    else:
        drawn = generator.lognormal(math.log(int(lengths)), SIGMA, count)
        sizes = drawn.round().clip(1, longest).astype(int)
    return [" ".join(generator.choice(words, size)) for size in sizes]


def compare(setting: Setting, texts: Sequence[str], repeats: int) -> list[Row]:
    """A row for each variant, ours first.

    Raises:
        ValueError: Vectors of one differ from ours.
    """
    encoders = dict(_built(setting))
    sizes = {name: _best_batch(encode, texts) for name, encode in encoders.items()}
    expected = encoders["ours"](texts, 0)
    errors = {name: _error(encoders[name](texts, sizes[name]), expected) for name in encoders}
    for name, error in errors.items():
        if not error <= TOLERANCE[setting.dtype]:
            apart = f"{error:.1e} apart, above {TOLERANCE[setting.dtype]:.0e}"
            raise ValueError(f"the vectors of {name} and ours are {apart}: no figures")
    names = list(encoders)
    rates: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=repeats * len(names), unit="run", leave=False) as bar:
        for turn in range(repeats):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                bar.set_description(name)
                taken_s = _timed(lambda name=name: encoders[name](texts, sizes[name]))
                rates[name].append(len(texts) / taken_s)
                bar.update()
    return [
        {
            "variant": name,
            "batch": sizes[name] if name != "ours" else "by tokens",
            "texts_per_s": spread(rates[name]),
            "peak_bytes": _peak_apart(setting, name, texts, sizes[name]),
            "error": errors[name],
        }
        for name in names
    ]


def _built(setting: Setting) -> Iterator[tuple[str, Encode]]:
    """The variants whose libraries are here; of the others a line says so."""
    for name in VARIANTS:
        try:
            yield name, setting.build(name)
        except ImportError as error:
            if name == "ours":
                raise
            print(f"{name}: skipped, {error}")


def _best_batch(encode: Encode, texts: Sequence[str]) -> int:
    some = texts[: max(1, len(texts) // 4)]
    encode(some, BATCHES[0])  # warm
    return min(BATCHES, key=lambda size: _timed(lambda: encode(some, size)))


def _timed(run: Callable[[], Any]) -> float:
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


def _error(vectors_ND: np.ndarray, expected_ND: np.ndarray) -> float:
    return float(np.abs(vectors_ND - expected_ND).max() / np.abs(expected_ND).max())


def _peak_apart(setting: Setting, name: str, texts: Sequence[str], batch_size: int) -> int:
    """Bytes that a process of its own takes beyond the loaded model."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (setting, name, texts, batch_size))


def _peak(setting: Setting, name: str, texts: Sequence[str], batch_size: int) -> int:
    encode = setting.build(name)
    encode(texts[:1], batch_size)
    if setting.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        encode(texts, batch_size)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux then counts the peak anew
    before = _resident("VmRSS")
    encode(texts, batch_size)
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _shown(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    ours_per_s = rows[0]["texts_per_s"]["median"]
    for row in rows:
        rate = row["texts_per_s"]
        yield {
            "variant": row["variant"],
            "texts/s": f"{rate['median']:.1f}",
            "p20-p80": f"{rate['p20']:.1f}-{rate['p80']:.1f}",
            "ours is": f"{ours_per_s / rate['median']:.2f} x",
            "batch": str(row["batch"]),
            "peak MiB": f"{row['peak_bytes'] / 2**20:.0f}",
            "error": f"{row['error']:.0e}",
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.encode`."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _build_parser().parse_args(words)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each variant has the same cores
    rows: list[Row] = []
    try:
        for group in _run(arguments, f"python -m benchmarks.encode {' '.join(words)}"):
            rows += group
            if arguments.out:  # with each: the next may be cut off
                arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    except (ValueError, OSError, ImportError) as error:
        print("benchmarks.encode: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    if arguments.out:
        caption = f"{rows[0]['device']}, {rows[0]['dtype']}, commit {rows[0]['commit']}"
        draw_bars(rows, arguments.out.with_suffix(".png"), unit="texts", caption=caption)
    return 0


def _run(arguments: argparse.Namespace, command: str) -> Iterator[list[Row]]:
    """The rows of each distribution of lengths."""
    device = arguments.device or device_type()
    folder = Path(arguments.folder) / ENCODER
    tokenizer = load_tokenizer(folder)
    known = [word.removeprefix(WORD) for word in tokenizer.get_vocab() if word.startswith(WORD)]
    words = sorted(filter(str.isalpha, known))
    trained = find_trained(arguments.folder)
    setting = Setting(
        folder=arguments.folder,
        language=arguments.language or min(languages_of(tokenizer, folder).codes),
        dtype=arguments.dtype,
        device=device,
        threads=arguments.threads or torch.get_num_threads(),
    )
    world = World(rank=0, size=1, local_rank=0, device=torch.device(device))
    about = environment(world) | {"command": command, "dtype": setting.dtype}
    about |= {"threads": setting.threads, "texts": arguments.texts, "folder": arguments.folder}
    longest = trained.config.data.max_length // 2
    for lengths in arguments.lengths.split(","):
        texts = draw_texts(words, lengths, arguments.texts, longest)
        group = compare(setting, texts, arguments.repeats)
        print(f"\n{len(texts)} texts, lengths {lengths}, {setting.dtype}, {about['device']}")
        print(table(list(_shown(group))), flush=True)
        yield [about | {"lengths": lengths} | row for row in group]


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.encode", description="Vectors of texts, beside what people use."
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="of `mtllm export`")
    add("--language", default="", metavar="CODE", help="default: the first that the model has")
    add("--lengths", default=f"40,{EQUAL}", help="median words of a text, or equal; with commas")
    add("--texts", type=int, default=512, metavar="N", help="default: 512")
    add("--repeats", type=int, default=5, metavar="N", help="of each variant (default: 5)")
    add("--dtype", choices=list(TOLERANCE), default="float32", help="default: float32")
    add("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    add("--threads", type=int, metavar="N", help="on a CPU (default: its cores)")
    add("--out", type=Path, metavar="FILE", help="a JSON line for each variant, and a chart beside")
    return parser


if __name__ == "__main__":
    sys.exit(main())
