"""`mtllm encode` and `mtllm classify` on tiny runs: what they write, go on from, and refuse."""

import gc
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mtllm_engine import encode, files
from mtllm_engine.cli import main
from mtllm_engine.encode import ENDINGS, Parts, Request
from mtllm_engine.export import export
from mtllm_engine.finetune import finetune
from mtllm_engine.inference import MTLLM, Classified
from mtllm_engine.train import train
from tests.support.machine import launch
from tests.support.stages import (
    ALONE,
    build_models,
    finetuning_config,
    stage1_config,
    stage2_config,
    write_topics,
)
from tests.support.tiny import texts

pytestmark = pytest.mark.usefixtures("one_thread")

LANGUAGE = ["--language", "swh_Latn"]
TEXTS = texts(21, seed=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Stage 1, an LLM fine-tuned on topics, stage 2."""
    folder = build_models(tmp_path_factory.mktemp("encode"))
    write_topics(folder, "eng_Latn", train=12, dev=4)
    train(stage1_config(folder), ALONE)
    finetune(finetuning_config(folder, "sib200"), ALONE)
    train(stage2_config(folder, "sib200"), ALONE)
    return folder


@pytest.fixture(scope="module")
def stack(models: Path) -> MTLLM:
    return MTLLM.from_pretrained(models / "stage1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The current folder, with the texts in three kinds of files; chunks are of four texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encode, "CHUNK_TEXTS", 4)
    Path("a.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    rows = [{"of": {"text": text}, "other": "and this?"} for text in TEXTS]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.table({"body": TEXTS}), "a.parquet")
    return tmp_path


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many texts a model was given, at each call."""
    numbers, encode_texts = [], MTLLM.encode

    def counting(self, texts, *arguments, **options):
        numbers.append(len(texts))
        return encode_texts(self, texts, *arguments, **options)

    monkeypatch.setattr(MTLLM, "encode", counting)
    return numbers


def encoded(models: Path, source: str, out: str, *options: str, run: str = "stage1") -> np.ndarray:
    command = ["encode", source, "--model", str(models / run), "--out", out, *LANGUAGE, *options]
    assert main(command) == 0
    assert not Path(f"{out}.parts").exists()
    if out.endswith(".npy"):
        return np.load(out)
    return np.stack(parquet.read_table(out)["embedding"].to_numpy())


def is_close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    return np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("source", "field"),
    [("a.txt", []), ("a.jsonl", ["--field", "of.text"]), ("a.parquet", ["--field", "body"])],
)
def test_vectors_are_those_of_python(models, stack, folder, source, field, capsys):
    wanted = stack.encode(TEXTS, "swh_Latn")
    vectors = encoded(models, source, "out.npy", *field)
    line = capsys.readouterr().out
    assert line.startswith(f"out.npy: 21 texts, {_cut(stack)} cut, ") and line.count("\n") == 1
    assert is_close(vectors, wanted) and len(np.unique(wanted, axis=0)) > 1
    assert sorted(os.listdir()) == ["a.jsonl", "a.parquet", "a.txt", "out.npy"]


def _cut(stack: MTLLM) -> int:
    before = stack.cut
    stack.encode(TEXTS, "swh_Latn")
    assert stack.cut > before
    return stack.cut - before


def test_the_teacher_s_vectors_of_length_1_in_a_table(models, folder):
    vectors = encoded(
        *(models, "a.txt", "out.parquet", "--reader", "teacher", "--normalize"),
        run="stage2-sib200",
    )
    model = MTLLM.from_pretrained(models / "stage2-sib200")
    assert is_close(vectors, model.encode(TEXTS, reader="teacher", normalize=True))
    table = parquet.ParquetFile("out.parquet")
    assert table.read()["text"].to_pylist() == TEXTS
    assert table.schema_arrow.field("embedding").type == pyarrow.list_(pyarrow.float32(), 48)
    assert table.num_row_groups == 6


def test_standard_input_is_read_a_text_a_line(models, stack, folder, monkeypatch):
    content = b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert is_close(encoded(models, "-", "out.npy"), stack.encode(TEXTS, "swh_Latn"))


def test_an_exported_folder_knows_its_language(models, stack, folder):
    export(models / "stage1", "exported", default_language="swh_Latn")
    assert main(["encode", "a.txt", "--model", "exported", "--out", "out.npy"]) == 0
    assert is_close(np.load("out.npy"), stack.encode(TEXTS, "swh_Latn"))


class Killed(BaseException):
    """What no code of ours expects."""


def test_one_command_at_a_time_writes_a_file(models, folder, capfd):
    """Another would take its finished chunks for those of a request that is not its own."""
    parts = Parts(Path("out.npy"), "another request")
    finished = parts.folder / f"{0:08d}-{0:032x}-0.npy"
    command = ["encode", "a.txt", "--model", str(models / "stage1"), *LANGUAGE, "--out", "out.npy"]
    with parts.claimed():
        finished.write_bytes(b"finished")
        assert main(command) == 1
        message = capfd.readouterr().err
        assert message.endswith("another command is writing out.npy; wait for it\n")
        assert finished.read_bytes() == b"finished"
    assert main(command) == 0 and not parts.folder.exists()


def test_all_chunks_are_of_one_checkpoint(models, stack, folder, monkeypatch):
    """Of that which was the run's when the command began."""
    run = Path(shutil.copytree(models / "stage1", "run", symlinks=True))
    load = Request.load

    def loading(self, world):
        newer = run / "checkpoints" / "step-00000009"
        shutil.copytree((run / "checkpoints" / "latest").resolve(), newer)
        files.link(run / "checkpoints" / "latest", newer.name)
        (newer / "projection.safetensors").unlink()
        return load(self, world)

    monkeypatch.setattr(Request, "load", loading)
    command = ["encode", "a.txt", "--model", "run", *LANGUAGE, "--out", "out.npy"]
    assert main(command) == 0
    np.testing.assert_allclose(np.load("out.npy"), stack.encode(TEXTS, "swh_Latn"), atol=1e-5)


def test_models_that_have_moved_are_named(models, stack, folder, capfd):
    shutil.copytree((models / "stage1" / "checkpoints" / "latest").resolve(), "alone")
    places = ["--encoder", str(models / "encoder"), "--decoder", str(models / "decoder")]
    command = ["encode", "a.txt", "--model", "alone", *LANGUAGE, "--out", "out.npy"]
    assert main(command) == 1
    assert "there is no config.toml of its run beside it" in capfd.readouterr().err
    assert main([*command, *places]) == 0
    np.testing.assert_allclose(np.load("out.npy"), stack.encode(TEXTS, "swh_Latn"), atol=1e-5)
    assert main(["show", "alone", *places]) == 0
    assert str(models / "encoder") in capfd.readouterr().out
    assert main(["export", "alone", *places, "--out", "exported"]) == 0


def test_the_same_command_goes_on_where_it_broke(models, stack, folder, calls, monkeypatch):
    def write(*arguments):
        if len(os.listdir("out.npy.parts")) == 3:
            raise Killed
        return whole(*arguments)

    whole = Parts.write
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Parts, "write", write)
        encoded(models, "a.txt", "out.npy")
    assert calls == [4, 4, 4, 4] and not Path("out.npy").exists()
    # What stands in the first chunk, and only there, is other text now.
    changed = ["a new text", *TEXTS[1:]]
    Path("a.txt").write_text("".join(f"{text}\n" for text in changed))
    calls.clear()
    vectors = encoded(models, "a.txt", "out.npy", "--max-tokens", "300")
    assert calls == [4, 4, 4, 1]
    calls.clear()
    assert is_close(vectors, stack.encode(changed, "swh_Latn"))


def test_what_was_made_otherwise_is_made_again(models, stack, folder, calls, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "join", lambda *_: 0)
        for options in ((), ("--normalize",)):
            command = ["encode", "a.txt", "--model", str(models / "stage1"), "--out", "out.npy"]
            assert main([*command, *LANGUAGE, *options]) == 0
    assert calls == 2 * [4, 4, 4, 4, 4, 1]
    vectors = encoded(models, "a.txt", "out.npy")
    assert calls == 2 * [4, 4, 4, 4, 4, 1]
    assert is_close(vectors, stack.encode(TEXTS, "swh_Latn"))


def encode_on_full_disk(models: Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    command = ["encode", "a.txt", "--model", str(models / "stage1"), "--out", "out.npy", *LANGUAGE]
    sys.exit(main(command))


# A chunk of four vectors has 896 bytes, all 21 have 4,160.
@pytest.mark.parametrize(("limit", "kept"), [(500, 0), (2000, 6)])
def test_a_full_disk_leaves_nothing_half_written(models, stack, folder, calls, limit, kept, capfd):
    context = multiprocessing.get_context("fork")
    child = context.Process(target=encode_on_full_disk, args=(models, limit))
    child.start()
    child.join()
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    begins = "mtllm: error: cannot write out.npy: File too large; what is finished is kept in "
    assert child.exitcode == 1 and len(lines) == 1 and lines[0].startswith(begins)
    parts = Path("out.npy.parts")
    assert not Path("out.npy").exists() and len(os.listdir(parts) if kept else []) == kept
    if kept:
        vectors = encoded(models, "a.txt", "out.npy")
        assert not calls and "21 texts, 21 of them before, 2 cut\n" in capfd.readouterr().out
        assert is_close(vectors, stack.encode(TEXTS, "swh_Latn"))


def test_ranks_make_every_second_chunk_each(models, stack, folder):
    request = Request(
        **{"command": "encode", "source": "a.txt", "model": str(models / "stage1")},
        **{"language": "swh_Latn", "out": str(folder / "out.npy"), "device": "cpu"},
    )
    launch(2, "tests.test_encode", str(folder), json.dumps(asdict(request)))
    assert is_close(np.load("out.npy"), stack.encode(TEXTS, "swh_Latn"))
    assert not Path("out.npy.parts").exists()


def test_memory_does_not_grow_with_the_number_of_texts(models, folder):
    peaks: dict[int, list[int]] = {4: [], 40: []}
    for number, count in enumerate((4, 4, 40, 4, 40)):  # what is loaded once is by the first
        long = (f"{number} {'word ' * 400}\n" for number in range(4 * count))
        Path("b.txt").write_text("".join(long))
        gc.collect()  # or another test's garbage is counted
        tracemalloc.start()
        encoded(models, "b.txt", f"{number}.npy")
        peaks[count].append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    chunk = 4 * 2000
    assert np.load("2.npy").shape == (160, 48)
    # The least of two, as it depends on when Python collects garbage.
    assert min(peaks[40]) < min(peaks[4]) + 4 * chunk, "36 more chunks must not be held"


def test_a_chunk_of_long_texts_is_small(folder, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 100)
    request = Request(command="encode", source="a.txt", model="")
    chunks = list(request.chunks())
    assert sum(chunks, []) == TEXTS and len({*map(len, chunks)}) > 1
    assert all(sum(map(len, chunk[:-1])) < 100 for chunk in chunks)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    ending=st.sampled_from(sorted({*ENDINGS["encode"], *ENDINGS["classify"]})),
    classes=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_joined_parts_are_what_one_part_would_be(sizes, ending, classes, seed):
    generator = np.random.default_rng(seed)
    values_NY = generator.random((sum(sizes), classes), np.float32)
    words = texts(sum(sizes), seed=seed)
    names = tuple("abc"[:classes])

    def answer(start: int, end: int) -> np.ndarray | Classified:
        if ending == ".npy" or (ending == ".parquet" and seed % 2):
            return values_NY[start:end]
        return Classified(["é"] * (end - start), values_NY[start:end], names)

    with tempfile.TemporaryDirectory() as folder:
        contents = []
        for name, pieces in (("many", sizes), ("one", [sum(sizes)])):
            parts = Parts(Path(folder, f"{name}{ending}"), "identity")
            parts.folder.mkdir()
            called, start = [], 0
            for number, size in enumerate(pieces):
                chunk = words[start : start + size]
                called.append(parts.name(number, chunk))
                parts.write(called[-1], 2, chunk, answer(start, start + size))
                start += size
            assert parts.join(called) == 2 * len(pieces)
            contents.append(_read(parts.out))
        assert contents[0] == contents[1]
        assert sorted(os.listdir(folder)) == [f"many{ending}", f"one{ending}"]


def _read(path: Path):
    if path.suffix == ".npy":
        return np.load(path).tolist()
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def classified(models: Path, *options: str, run: str = "stage2-sib200") -> int:
    return main(["classify", *options, "--model", str(models / run), *LANGUAGE])


def test_labels_are_those_of_python(models, folder):
    wanted = MTLLM.from_pretrained(models / "stage2-sib200").classify(TEXTS, "swh_Latn")
    assert classified(models, "a.txt", "--out", "out.jsonl") == 0
    assert classified(models, "a.txt", "--out", "out.parquet") == 0
    assert len(np.unique(wanted.probabilities, axis=0)) > 1
    rows = _read(Path("out.jsonl"))
    assert [row["label"] for row in rows] == wanted.labels
    assert all(tuple(row["probabilities"]) == wanted.names for row in rows)
    table = _read(Path("out.parquet"))
    assert [row["label"] for row in table] == wanted.labels
    for found in (rows, table):
        values = np.array([[*row["probabilities"].values()] for row in found], np.float32)
        assert is_close(values, wanted.probabilities)
    assert rows[0]["probabilities"] == pytest.approx(table[0]["probabilities"])


def test_pairs_are_read_of_two_fields_and_asked_about_an_added_task(models, folder, capsys):
    topics = f"topics={models / 'finetune-sib200'}"
    options = ("a.jsonl", "--field", "of.text,other", "--adapter", topics, "--task", "topics")
    assert classified(models, *options, run="stage1") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    stack = MTLLM.from_pretrained(models / "stage1")
    stack.add_task("topics", models / "finetune-sib200")
    pairs = [(text, "and this?") for text in TEXTS]
    wanted = stack.classify(pairs, "swh_Latn", task="topics")
    assert [line[0] for line in lines] == wanted.labels
    highest = [f"{probability:.4f}" for probability in wanted.probabilities.max(1)]
    assert [line[1] for line in lines] == highest
    assert [tuple(line[2:]) for line in lines] == [(" ".join(a.split()), b) for a, b in pairs]


def test_no_texts_have_no_vectors(models, folder):
    Path("empty.txt").write_text("")
    assert encoded(models, "empty.txt", "out.npy").shape == (0, 48)
    nowhere = ["encode", "empty.txt", "--model", str(models / "stage1"), "--out", "out.parquet"]
    assert main(nowhere) == 0
    assert parquet.read_table("out.parquet").column_names == ["text", "embedding"]
    os.remove("out.parquet")
    assert classified(models, "empty.txt", "--out", "out.parquet") == 0
    assert parquet.read_table("out.parquet").column_names == ["label", "probabilities"]
    assert classified(models, "empty.txt", "--out", "out.jsonl") == 0
    assert Path("out.jsonl").read_bytes() == b""


def test_a_line_of_a_megabyte_is_cut(models, folder, capsys):
    Path("long.txt").write_text("word " * 200_000 + "\nword\n")
    vectors = encoded(models, "long.txt", "out.npy")
    assert vectors.shape == (2, 48) and np.isfinite(vectors).all()
    assert "out.npy: 2 texts, 1 cut, " in capsys.readouterr().out


RUN = "--model {models}/stage1 --language swh_Latn"
MISTAKES = [
    (
        "encode a.txt --out out.npy --model {models}/stage1",
        1,
        "say which language the texts are in, such as --language swh_Latn",
    ),
    ("encode a.txt --out out.npy --model {models}/stage1 --language swahili", 1, "unknown lang"),
    (f"encode absent.txt --out out.npy {RUN}", 1, "no such file or folder: absent.txt"),
    (f"encode . --out out.npy {RUN}", 1, ". is a folder; name one file that ends in .txt, "),
    (f"encode a.csv --out out.npy {RUN}", 1, "a.csv: neither a file nor a folder with files"),
    (f"encode gap.txt --out out.npy {RUN}", 1, "gap.txt:2: empty; mend it or take it out"),
    (f"encode bad.txt --out out.npy {RUN}", 1, "bad.txt:1: not UTF-8; mend it or take it out"),
    (f"encode a.jsonl --out out.npy {RUN}", 1, "a.jsonl:1: no field 'text'; mend it or"),
    (f"encode a.parquet --out out.npy {RUN}", 1, "a.parquet has no column 'text'; name one"),
    (f"encode a.txt --out out.csv {RUN}", 1, "--out out.csv must end in .npy or .parquet"),
    (f"encode a.txt --out a.parquet {RUN}", 1, "a.parquet is there already; name another --out"),
    (f"encode a.txt --out b/out.npy {RUN}", 1, "there is no folder b for --out; make it"),
    (f"encode a.txt --out {{sealed}}/out.npy {RUN}", 1, "cannot write {sealed}/out.npy: "),
    (f"encode a.txt --out out.npy {RUN} --gpus 0", 1, "--gpus must be at least 1, not 0"),
    (f"encode - --out out.npy {RUN} --gpus 2", 1, "standard input goes to one rank and cannot"),
    (f"encode a.txt --out out.npy {RUN} --max-tokens 0", 1, "--max-tokens must be at least 1"),
    (f"encode a.txt --out out.npy {RUN} --device cuda", 1, "there is no GPU that torch sees"),
    (f"encode a.txt {RUN}", 2, "the following arguments are required: --out"),
    ("encode a.txt --out out.npy --model . --language swh_Latn", 1, ". is neither a run, a check"),
    (
        "encode a.txt --out out.npy --model {models}/finetune-sib200 --language swh_Latn",
        1,
        "{models}/finetune-sib200/checkpoints/step-",
    ),
    (f"classify a.txt --out out.npy {RUN}", 1, "--out out.npy must end in .jsonl or .parquet"),
    (
        f"classify a.txt --out out.jsonl {RUN}",
        1,
        "{models}/stage1/checkpoints/",
    ),
    (f"classify a.txt {RUN} --gpus 2", 1, "several ranks write into a file; name one with --out"),
    (f"classify a.txt {RUN} --field a,b", 1, "a.txt has one text a line; two fields are read of"),
    (f"classify a.txt {RUN} --adapter x", 2, "argument --adapter: write NAME=CHECKPOINT, not 'x'"),
    (f"classify a.txt {RUN} --adapter x=absent", 1, "absent is neither a run, a checkpoint nor"),
    (
        "classify a.txt --model {models}/stage2-sib200 --language swh_Latn --task nli",
        1,
        "there is no task 'nli': {models}/stage2-sib200/checkpoints/step-",
    ),
]


@pytest.mark.parametrize(("command", "status", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(models, folder, command, status, message, capfd):
    Path("a.csv").write_text("a text\n")
    Path("gap.txt").write_text("one\n \nthree\n")
    Path("bad.txt").write_bytes(b"\xff\xfe\n")
    places = {"models": models, "sealed": "/proc/self"}
    before = sorted(os.listdir())
    try:
        returned = main(command.format(**places).split())
    except SystemExit as left:
        returned = left.code
    out, err = capfd.readouterr()
    assert returned == status and out == "" and err.count("\n") == 1
    assert err.startswith(f"mtllm: error: {message.format(**places)}")
    assert sorted(os.listdir()) == before


def test_ranks_are_launched_with_the_request(folder, monkeypatch):
    class Launched(Exception):
        pass

    def execv(_, command):
        raise Launched(*command)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    command = "classify a.jsonl --field a,b --model x --out o.jsonl --adapter t=y --gpus 2"
    with pytest.raises(Launched) as launched:
        main(command.split())
    *_, option, module, word = launched.value.args
    assert (option, module) == ("--module", "mtllm_engine.encode")
    wanted = {"command": "classify", "source": "a.jsonl", "fields": ["a", "b"], "model": "x"}
    assert json.loads(word).items() >= (wanted | {"adapters": [["t", "y"]]}).items()


def test_a_rank_without_a_request_says_how_it_is_run(capfd):
    assert encode.main(["--local_rank=0"]) == 2
    assert "".join(capfd.readouterr()).startswith("usage: mtllm encode|classify INPUT --model X")


if __name__ == "__main__":  # a rank, in a folder, with chunks of four texts
    os.chdir(sys.argv[1])
    encode.CHUNK_TEXTS = 4
    sys.exit(encode.main(sys.argv[2:]))
