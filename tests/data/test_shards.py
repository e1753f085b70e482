import contextlib
import gzip
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtllm_engine import files
from mtllm_engine.cli import main
from mtllm_engine.data import shards, sources, tars
from mtllm_engine.data.annotations import Annotations
from mtllm_engine.data.shards import (
    BadDocumentError,
    Corpus,
    Manifest,
    import_shards,
    show,
    verify,
)
from mtllm_engine.data.tars import DamagedShardError, Shard

LANGUAGE = "eng_Latn"
BLOCK = 512


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def corpus_folder(tmp_path):
    """3 shards of 4 documents each."""
    source = tmp_path / "source.txt"
    source.write_text("".join(f"document {number:02d}\n" for number in range(12)))
    pack([source], tmp_path / "corpus", shards=3)
    return tmp_path / "corpus"


def pack(inputs, out, **options):
    return sources.pack(
        inputs, out, **{"language": LANGUAGE, "shards": 2, "progress": False} | options
    )


def import_(folder, **options):
    return import_shards(folder, language=LANGUAGE, progress=False, **options).manifest


def read_all(folder):
    corpus = Corpus(folder)
    counts = [shard.samples for shard in corpus.manifest.shards]
    samples = [
        corpus.read(shard, index) for shard, count in enumerate(counts) for index in range(count)
    ]
    corpus.close()
    return samples


def plain_webdataset(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_parquet(path, texts):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "number": range(len(texts))}), path, row_group_size=50
    )


LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1)
LINES = st.lists(
    LINE.filter(lambda line: line.strip() and not line.startswith("\ufeff")),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(lines=LINES, data=st.data())
def test_pack_round_trip(lines, data):
    num_shards = data.draw(st.integers(1, len(lines)))
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source.txt", Path(name) / "corpus"
        source.write_bytes("\n".join(lines).encode())
        manifest = pack([source], out, shards=num_shards).manifest
        ours = read_all(out)
        assert [text for _, text in ours] == lines
        assert ours == [
            (sample["__key__"], sample["txt"].decode()) for sample in plain_webdataset(out)
        ]
    assert len(manifest.shards) == num_shards
    assert all(shard.samples for shard in manifest.shards)


NAME = st.lists(
    st.sampled_from(["a", "b", ".", "/", ".txt", ".TXT", ".json", "__m__", "é"]),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@example(names=["__m__/a.txt", "a.txt", "__m__.txt"])
@example(names=["a.txt", "b.txt", "a.txt"])
@example(names=["a.txt", "a.TXT"])
@given(names=st.lists(NAME.map("".join), min_size=1, max_size=6))
def test_samples_are_those_of_webdataset(names):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tar(
            folder / "0.tar",
            [(name, f"text {number}".encode()) for number, name in enumerate(names)],
        )
        try:
            theirs = plain_webdataset(folder)
        except ValueError:  # two members of one name
            with pytest.raises(DamagedShardError, match="duplicate"):
                import_(folder)
            return
        if not any("txt" in sample for sample in theirs):
            with pytest.raises(ValueError, match="no member 'txt'"):
                import_(folder)
            return
        assert import_(folder).samples == len(theirs)
        corpus = Corpus(folder)
        for index, sample in enumerate(theirs):
            if "txt" in sample:
                assert corpus.read(0, index) == (sample["__key__"], sample["txt"].decode())
            else:
                with pytest.raises(BadDocumentError, match="no member 'txt'"):
                    corpus.read(0, index)


def test_reads_what_shard_writer_wrote(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/part-%03d.tar", maxcount=4, verbose=0) as writer:
        for number in range(10):
            name = f"wiki.v1/{'long/' * 30}{number:03d}"
            record = {"body": {"text": f"text {number}"}}
            writer.write(
                {"__key__": name, "cls": number, "meta.json": record, "src.txt": f"source {number}"}
            )
    manifest = import_(tmp_path, field="meta.json.body.text")
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2]
    theirs = plain_webdataset(tmp_path)
    ours = read_all(tmp_path)
    assert ours == [(s["__key__"], json.loads(s["meta.json"])["body"]["text"]) for s in theirs]
    assert ours[3] == (f"wiki.v1/{'long/' * 30}003", "text 3")
    import_(tmp_path, field="src.txt")
    assert [text for _, text in read_all(tmp_path)] == [s["src.txt"].decode() for s in theirs]


def test_links_and_folders_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in [
            ("d.txt", tarfile.DIRTYPE),
            ("l.txt", tarfile.SYMTYPE),
            ("a.txt", tarfile.REGTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, 4 * (kind == tarfile.REGTYPE), "a.txt"
            tar.addfile(info, io.BytesIO(b"text"))
    import_(tmp_path)
    assert read_all(tmp_path) == [("a", "text")]


def cut(num_bytes):
    return lambda path: os.truncate(path, num_bytes)


def flip(offset):
    def apply(path):
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))

    return apply


def lengthen(path):
    with path.open("ab") as file:
        file.write(b"more" * 128)


# A packed member takes two blocks: its header and its data.
DAMAGE = {
    "empty": (cut(0), "is cut: 0 of 10240 bytes"),
    "cut at a header": (cut(2 * BLOCK), "is cut: 1024 of 10240 bytes"),
    "cut in a header": (cut(2 * BLOCK + 100), "is cut: 1124 of"),
    "cut in data": (cut(3 * BLOCK + 5), "is cut: 1541 of"),
    "cut in the end": (cut(9 * BLOCK), "is cut: 4608 of"),
    "header flipped": (flip(2 * BLOCK + 3), "does not match its sha256"),
    "data flipped": (flip(3 * BLOCK + 3), "does not match its sha256"),
    "too long": (lengthen, "is too long: 10752 bytes, its manifest says 10240"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_remembered_and_contained(corpus_folder, kind, monkeypatch):
    damage, message = DAMAGE[kind]
    path = corpus_folder / "000001.tar"
    damage(path)
    corpus = Corpus(corpus_folder)
    with pytest.raises(DamagedShardError) as first:
        corpus.read(1, 0)
    assert str(first.value).startswith(f"shard {path} {message}")
    assert "data.on_error=skip" in str(first.value) and "\n" not in str(first.value)
    assert corpus.read(0, 3).text == "document 03" and corpus.read(2, 0).text == "document 08"
    monkeypatch.setattr(tars, "_cached_index", None)
    with pytest.raises(DamagedShardError) as second:
        corpus.read(1, 2)
    assert str(second.value) == str(first.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is not a sound tar: empty file"),
        ("cut at a header", "is cut: no end of the archive at byte 1024"),
        ("cut in a header", "is cut: no end of the archive at byte 1024"),
        ("cut in data", "is not a sound tar: unexpected end of data"),
        ("cut in the end", "is cut: no end of the archive at byte 4096"),
        ("header flipped", "is damaged at byte 1024: no valid header"),
        ("too long", "goes on after its end of the archive at byte 4096"),
    ],
)
def test_damaged_tar_is_not_imported(corpus_folder, kind, message):
    DAMAGE[kind][0](corpus_folder / "000001.tar")
    before = (corpus_folder / "manifest.json").read_bytes()
    with pytest.raises(DamagedShardError, match=rf"^shard .*000001\.tar {message}.*; restore it"):
        import_(corpus_folder)
    assert (corpus_folder / "manifest.json").read_bytes() == before


def test_shard_cut_while_open(corpus_folder):
    corpus = Corpus(corpus_folder)
    corpus.read(0, 0)
    os.truncate(corpus_folder / "000000.tar", 600)
    with pytest.raises(DamagedShardError, match="was cut while it was read"):
        corpus.read(0, 3)


def unsigned(manifest):
    """As who changes a manifest by hand is told to leave it."""
    return re.sub(r' "fingerprint": "[0-9a-f]{64}",\n', "", manifest)


def test_wrong_count_in_manifest(corpus_folder):
    path = corpus_folder / "manifest.json"
    path.write_text(unsigned(path.read_text()).replace('"samples": 4', '"samples": 5'))
    with pytest.raises(DamagedShardError, match="holds 4 samples, its manifest says 5"):
        Corpus(corpus_folder).read(0, 0)


def test_compressed_tars_are_refused(tmp_path):
    write_tar(tmp_path / "plain", [("a.txt", b"text")])
    (tmp_path / "0.tar").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    with pytest.raises(ValueError, match=r"0\.tar is compressed \(gzip\)"):
        import_(tmp_path)
    (tmp_path / "0.tar").rename(tmp_path / "0.tar.gz")
    with pytest.raises(ValueError, match=r"0\.tar\.gz is compressed"):
        import_(tmp_path)


def test_sparse_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.size = tarfile.GNUTYPE_SPARSE, 4
        tar.addfile(info, io.BytesIO(b"text"))
    with pytest.raises(DamagedShardError, match="has a sparse member, a.txt"):
        import_(tmp_path)


def test_verify_lists_every_problem(corpus_folder):
    assert verify(corpus_folder, progress=False) == []
    cut(100)(corpus_folder / "000000.tar")
    flip(BLOCK)(corpus_folder / "000002.tar")
    write_tar(corpus_folder / "extra.tar", [])
    problems = verify(corpus_folder, progress=False)
    assert len(problems) == 3
    for problem, words in zip(
        problems, ["extra.tar is not in", "000000.tar is cut", "000002.tar does not"], strict=True
    ):
        assert words in problem


BAD_TEXTS = {"not UTF-8": b"\xff\xfe", "empty": b"", "empty ": b" \n\t\xe2\x80\x83"}
BAD_JSON = {
    "not JSON": b"{",
    " not JSON": b"[" * 200_000,
    "no field 'a.b'": b'{"a": {"c": 1}}',
    "no field 'a.b' ": b'["a"]',
    "field 'a.b' is not text": b'{"a": {"b": 3}}',
    "field 'a.b' has half a surrogate pair": b'{"a": {"b": "x\\ud800"}}',
    "empty": b'{"a": {"b": " "}}',
}


@pytest.mark.parametrize(("field", "bad"), [("txt", BAD_TEXTS), ("json.a.b", BAD_JSON)])
def test_bad_documents_are_named(tmp_path, field, bad):
    extension = field.partition(".")[0]
    good = {"txt": b"fine", "json": b'{"a": {"b": "fine"}}'}[extension]
    raws = [*bad.values(), good]
    write_tar(
        tmp_path / "0.tar", [(f"{number}.{extension}", raw) for number, raw in enumerate(raws)]
    )
    import_(tmp_path, field=field)
    corpus = Corpus(tmp_path)
    for index, reason in enumerate(bad):
        with pytest.raises(BadDocumentError) as error:
            corpus.read(0, index)
        assert str(error.value) == f"shard {tmp_path}/0.tar, key {index}: {reason.strip()}"
    assert corpus.read(0, len(bad)) == (str(len(bad)), "fine")
    assert len(verify(tmp_path, progress=False)) == len(bad)


def write_source(folder, kind, texts):
    path = folder / f"source.{kind}"
    plain = texts if kind.startswith("txt") else [json.dumps({"text": text}) for text in texts]
    raw = "".join(f"{line}\n" for line in plain).encode()
    if kind == "parquet":
        write_parquet(path, texts)
    else:
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    return path


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "json.gz", "parquet"])
def test_shards_are_even_whatever_the_source(tmp_path, kind):
    texts = [f"número {number * 7919:08d}" for number in range(400)]
    source = write_source(tmp_path, kind, texts)
    manifest = pack([source], tmp_path / "corpus", shards=8).manifest
    assert [text for _, text in read_all(tmp_path / "corpus")] == texts
    assert all(48 <= shard.samples <= 52 for shard in manifest.shards)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", source.name]


def test_large_gzip_is_even_without_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALL_INPUT_BYTES", 0)
    texts = [os.urandom(500).hex() for _ in range(800)]
    source = write_source(tmp_path, "txt.gz", texts)
    manifest = pack([source], tmp_path / "corpus", shards=4).manifest
    assert all(180 <= shard.samples <= 220 for shard in manifest.shards)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50) | st.just(10_000), min_size=1, max_size=40), data=st.data()
)
def test_every_shard_gets_a_document(sizes, data):
    num_shards = data.draw(st.integers(1, len(sizes)))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    assigned = list(
        sources._assign(zip(map(str, sizes), starts, strict=True), sum(sizes), num_shards)
    )
    assert [text for _, text in assigned] == list(map(str, sizes))
    numbers = [number for number, _ in assigned]
    assert numbers == sorted(numbers) and set(numbers) == set(range(num_shards))


def test_pack_folder_windows_lines_and_byte_order_mark(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\n two \r\n")
    (tmp_path / "in" / "deep" / "c.TXT").write_bytes(b"three")
    (tmp_path / "in" / ".hidden.txt").write_bytes(b"no")
    (tmp_path / "in" / "notes.md").write_bytes(b"no")
    write_parquet(tmp_path / "in" / "a.parquet", ["zero"])
    pack([tmp_path / "in"], tmp_path / "corpus")
    assert [text for _, text in read_all(tmp_path / "corpus")] == ["zero", "one", " two ", "three"]


OTHERS = [".jsonl.zst", ".txt.bz2", ".json.xz", ".zip", ".csv", ".csv.gz", ".arrow", ".tar", ""]


@settings(max_examples=20)
@given(others=st.lists(st.sampled_from(OTHERS), max_size=8), known=st.integers(1, 3))
@example(others=OTHERS, known=1)
def test_what_pack_leaves_out_is_counted_by_kind(others, known):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "in"
        (folder / "deep").mkdir(parents=True)
        for number, suffix in enumerate(others):
            (folder / ["", "deep"][number % 2] / f"other-{number}{suffix}").write_text("{}")
        for number in range(known):
            (folder / f"{number}.txt").write_text("text\n")
        report = pack([folder], Path(name) / "corpus", shards=1)
        assert report.manifest.samples == known
        assert report.left_out == Counter(suffix or "no ending" for suffix in others)


def test_a_folder_of_unknown_kinds_says_which(tmp_path):
    for name in ("a.jsonl.zst", "b.csv", "c.csv"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "d.txt").symlink_to("absent")
    message = r"\.parquet; it has 2 \.csv, 1 \.jsonl\.zst, 1 a link to nothing$"
    with pytest.raises(ValueError, match=message):
        pack([tmp_path], tmp_path / "corpus")


def test_json_lines_by_other_names_are_read(tmp_path):
    for number, suffix in enumerate((".ndjson", ".NDJSON", ".ndjson.gz")):
        raw = f'{{"text": "text {number}"}}\n'.encode()
        (tmp_path / f"{number}{suffix}").write_bytes(gzip.compress(raw) if number == 2 else raw)
    pack([tmp_path], tmp_path / "corpus")
    assert [text for _, text in read_all(tmp_path / "corpus")] == ["text 0", "text 1", "text 2"]


def test_linked_folders_are_read_once_each_and_hidden_ones_never(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for path in (folder / "z" / "real.txt", folder / ".ipynb_checkpoints" / "x.txt"):
        path.parent.mkdir(parents=True)
        path.write_text(f"{path.stem}\n")
    (folder / "z" / ".hidden.csv").write_text("x")
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "linked.txt").write_text("linked\n")
    (folder / "a").symlink_to("z")  # what has a path of its own keeps that
    for name in ("b", "c"):
        (folder / name).symlink_to(elsewhere)
    (elsewhere / "deep" / "loop").symlink_to(folder)
    (elsewhere / "deep" / "itself").symlink_to("itself")
    (elsewhere / "deep" / "shown").symlink_to(folder / ".ipynb_checkpoints")
    report = pack([folder], tmp_path / "corpus")
    assert [text for _, text in read_all(tmp_path / "corpus")] == ["linked", "x", "real"]
    assert report.left_out == {"a link to nothing": 1}
    again = pack([tmp_path / "in"], tmp_path / "again")
    assert again.manifest.fingerprint == report.manifest.fingerprint


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "in" / "locked").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("one\ntwo\n")
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(OSError, match="Permission denied"):
        pack([tmp_path / "in"], tmp_path / "corpus")


DOCUMENTS = st.lists(
    st.dictionaries(st.sampled_from(["text", "a", "b"]), LINE | st.lists(LINE), min_size=1)
    | st.builds(lambda text: {"text": text}, LINE),
    min_size=1,
    max_size=6,
)
LAYOUTS = {
    "an array": json.dumps,
    "an array, indented": lambda values: json.dumps(values, indent=2, ensure_ascii=False),
    "an array, an object a line": lambda values: f"[{','.join(map(line, values))}]",
    "an array, an object a line of its own": lambda values: f"[\n{','.join(map(line, values))}\n]",
    "objects, indented": lambda values: "\n".join(json.dumps(each, indent=1) for each in values),
}


def line(value):
    return json.dumps(value) + "\n"


@settings(max_examples=60)
@given(
    documents=DOCUMENTS,
    layout=st.sampled_from(sorted(LAYOUTS)),
    ends=st.sampled_from(["", "\n", " \r\n\n"]),
    starts=st.sampled_from(["", "\n", "\ufeff", " "]),
    on_error=st.sampled_from(["raise", "skip"]),
    head_bytes=st.sampled_from([1 << 20, 64]),  # as of a larger file
)
def test_json_that_is_not_json_lines_is_refused_whole(
    documents, layout, ends, starts, on_error, head_bytes
):
    content = starts + LAYOUTS[layout](documents) + ends
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_HEAD_BYTES", head_bytes)
        (Path(name) / "a.json").write_text("".join(content), newline="")
        (Path(name) / "b.txt").write_text("fine\n")
        with pytest.raises(ValueError, match=r"a\.json is a JSON .*JSON Lines are wanted") as error:
            pack([name], Path(name) / "corpus", shards=1, on_error=on_error)
        assert "\n" not in str(error.value)


@settings(max_examples=40)
@given(
    lines=st.lists(
        st.sampled_from(["{", "", "[]", '["a"]', "[deleted]", "x", '{"text": "a",', '{"text'])
        | st.builds(lambda text: json.dumps({"text": text}), LINE),
        max_size=6,
    ),
    head_bytes=st.sampled_from([1 << 20, 64]),
)
def test_json_lines_with_bad_ones_are_json_lines(lines, head_bytes):
    """Wherever the bad ones stand, the first included."""
    lines = [*lines, '{"text": "last"}', '{"text": "very last"}']
    good = [
        json.loads(each)["text"]
        for each in lines
        if each.startswith('{"text": "') and each.endswith("}")
    ]
    good = [text for text in good if text.strip()]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_HEAD_BYTES", head_bytes)
        (Path(name) / "a.jsonl").write_text("\n".join(lines))
        report = pack([name], Path(name) / "corpus", shards=1, on_error="skip")
        assert [text for _, text in read_all(Path(name) / "corpus")] == good
        assert sum(report.skipped.values()) == len(lines) - len(good)


def test_text_inside_a_struct_column(tmp_path):
    rows = [{"body": {"text": f"text {n}", "other": n}} if n != 2 else None for n in range(4)]
    table = pyarrow.table({"doc": rows, "doc.title": list("abcd"), "text": list("efgh")})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")

    def packed(field):
        out = tmp_path / field
        report = pack([tmp_path / "a.parquet"], out, shards=1, field=field, on_error="skip")
        return [text for _, text in read_all(out)], report.skipped

    assert packed("doc.body.text") == (["text 0", "text 1", "text 3"], {"empty": 1})
    assert packed("doc.title") == (list("abcd"), {}) and packed("text") == (list("efgh"), {})
    for field, message in {
        "doc.body.words": "no column 'doc.body.words': 'words' is not in struct<",
        "text.body": "no column 'text.body': 'body' is not in string",
        "doc.body": "column 'doc.body' holds struct<.*>, not text",
        "doc.body.other": "column 'doc.body.other' holds int64, not text",
        "words.body": "no column 'words'; name one with --field: doc, doc.title, text",
    }.items():
        with pytest.raises(ValueError, match=message):
            packed(field)


def test_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has 2 columns 'text'"):
        pack([tmp_path / "a.parquet"], tmp_path / "corpus", shards=1)


@pytest.mark.parametrize("out", [".", "../here"])
def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, out):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is the current folder; name one in it with --out"):
        pack([tmp_path / "a.txt"], Path(out), shards=1)
    assert os.listdir() == []


MEMBERS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["txt", "json"])), unique=True, min_size=1
)


@settings(max_examples=60)
@given(tars=st.lists(MEMBERS, min_size=1, max_size=3))
@example(tars=[[("a", "txt"), ("b", "txt"), ("a", "json"), ("b", "json")]])
def test_import_counts_what_training_cannot_use(tars):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, members in enumerate(tars):
            entries = [(f"{key}.{extension}", b"{}") for key, extension in members]
            write_tar(folder / f"{number}.tar", entries)
        samples = [  # as WebDataset reads them: members that follow one another
            (number, key, [extension for _, extension in group])
            for number, members in enumerate(tars)
            for key, group in itertools.groupby(members, key=lambda member: member[0])
        ]
        lacking = [(number, key) for number, key, has in samples if "txt" not in has]
        if len(lacking) == len(samples):
            return
        report = import_shards(folder, language=LANGUAGE, progress=False)
        assert report.manifest.samples == len(samples) and report.left_out == {}
        number, key = lacking[0] if lacking else (0, "")
        reason = f"no member 'txt', such as {key} in {number}.tar"
        assert report.skipped == ({reason: len(lacking)} if lacking else {})
        assert len(verify(folder, progress=False)) == len(lacking)
        repeated = len(samples) - len({(number, key) for number, key, _ in samples})
        assert sum(report.repeated.values()) == repeated
        assert all("sort the tar" in reason for reason in report.repeated)


def test_import_counts_what_it_does_not_read(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("0.tar", "._0.tar", "deep/1.tar", "deep/2.tar", "a.csv", "b.jsonl.zst"):
        write_tar(tmp_path / name, [("a.txt", b"text")])
    report = import_shards(tmp_path, language=LANGUAGE, progress=False)
    assert report.manifest.samples == 1
    assert report.left_out == {".csv": 1, ".jsonl.zst": 1, ".tar in a folder below": 2}


def test_dictionary_column(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pack([tmp_path / "a.parquet"], tmp_path / "corpus")
    assert [text for _, text in read_all(tmp_path / "corpus")] == ["a", "b", "a"]


def test_equal_input_gives_equal_bytes(tmp_path, monkeypatch):
    source = tmp_path / "a.txt"
    source.write_text("one\ntwo\nthree\n")
    first = pack([source], tmp_path / "first").manifest
    monkeypatch.setattr(time, "time", lambda: 1e9)
    second = pack([source], tmp_path / "second").manifest
    assert first == second and first.fingerprint == second.fingerprint
    assert (
        pack([source], tmp_path / "third", language="swh_Latn").manifest.fingerprint
        != first.fingerprint
    )


BAD_LINES = b'{"text": "one"}\n\n{"text": 3}\n{"body": "x"}\n\xff\n{\n{"text": "two"}\n'


def test_bad_lines_raise_with_their_place(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes(BAD_LINES)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: empty"):
        pack([source], tmp_path / "corpus")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_bad_lines_are_counted(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes(BAD_LINES)
    write_parquet(tmp_path / "b.parquet", ["three", None])
    report = pack([source, tmp_path / "b.parquet"], tmp_path / "corpus", on_error="skip")
    reasons = {
        "field 'text' is not text": 1,
        "no field 'text'": 1,
        "not UTF-8": 1,
        "not JSON": 1,
        "empty": 2,
    }
    assert report.skipped == reasons
    assert [text for _, text in read_all(tmp_path / "corpus")] == ["one", "two", "three"]


def make_inputs(folder):
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "a.csv").write_text("one\n")
    (folder / "empty.txt").write_text("")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n" * 100)[:-12])
    (folder / "cut.parquet").write_bytes(b"PAR1")
    write_parquet(folder / "a.parquet", ["one", "two"])
    (folder / "nothing").mkdir()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.csv", {}, r"a\.csv: neither .*\.jsonl"),
        ("nothing", {}, r"nothing: neither"),
        ("absent.txt", {}, r"no such file or folder: .*absent\.txt"),
        ("empty.txt", {}, "only 0 documents for 2 shards; check the inputs"),
        ("a.txt", {"shards": 3}, "only 2 documents for 3 shards; use --shards 2"),
        ("a.txt", {"shards": 0}, "use --shards 1 or more"),
        ("cut.txt.gz", {}, r"cut\.txt\.gz is cut or damaged"),
        ("cut.parquet", {}, r"cut\.parquet is not a sound Parquet file"),
        ("a.parquet", {"field": "body"}, r"a\.parquet has no column 'body'; .*: text, number"),
        ("a.parquet", {"field": "number"}, "column 'number' holds int64, not text"),
    ],
)
def test_unusable_input_is_one_clear_line(tmp_path, name, options, message):
    make_inputs(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        pack([tmp_path / name], tmp_path / "corpus", **options)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_existing_corpus_is_not_touched(corpus_folder):
    before = {path.name: path.read_bytes() for path in corpus_folder.iterdir()}
    with pytest.raises(ValueError, match="already there .* name another --out"):
        pack([corpus_folder.parent / "source.txt"], corpus_folder)
    assert {path.name: path.read_bytes() for path in corpus_folder.iterdir()} == before


def in_child(function, *arguments):
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    return child


def pack_on_full_disk(source, out):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    arguments = ["--out", str(out), "--language", LANGUAGE, "--shards", "2"]
    sys.exit(main(["shards", "pack", str(source), *arguments]))


def hold_out(inputs, out, share=0.3, **options):
    """The texts for training and those for validation, and the report."""
    report = pack(inputs, out, held_out=share, **options)
    assert report.path == out / "train" and sorted(os.listdir(out)) == ["train", "validation"]
    assert Manifest.load(out / "train") == report.manifest
    assert Manifest.load(out / "validation") == report.validation
    sides = [[text for _, text in read_all(out / side)] for side in ("train", "validation")]
    return *sides, report


SPACES = st.text(" \t\u00a0\u3000", max_size=3)


@settings(max_examples=10, deadline=None)
@given(numbers=st.lists(st.integers(0, 40), min_size=1), share=st.floats(0.2, 0.8), data=st.data())
def test_no_text_is_on_both_sides(numbers, share, data):
    """Whatever the number of shards and the white space at a text's ends."""
    numbers += range(41)  # so that no side is empty
    lines = [f"{data.draw(SPACES)}text {number}{data.draw(SPACES)}" for number in numbers]
    sides = []
    for num_shards in (1, data.draw(st.integers(2, 4))):
        with tempfile.TemporaryDirectory() as name:
            source = Path(name) / "source.txt"
            source.write_text("\n".join(lines))
            train, validation, report = hold_out(
                [source], Path(name) / "out", share, shards=num_shards
            )
        assert (report.manifest.samples, report.validation.samples) == (len(train), len(validation))
        assert len(report.manifest.shards) == num_shards
        kept, aside = ({text.strip() for text in side} for side in (train, validation))
        assert not kept & aside
        assert train == [line for line in lines if line.strip() in kept]
        assert validation == [line for line in lines if line.strip() in aside]
        sides.append(validation)
    assert sides[0] == sides[1]


def test_a_larger_share_holds_out_more_and_no_other_process_differs(tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("".join(f"text {number}\n" for number in range(4000)))
    small = hold_out([source], tmp_path / "small", 0.05)[1]
    large = hold_out([source], tmp_path / "large", 0.2)[1]
    assert set(small) < set(large)
    assert len(small) / 4000 == pytest.approx(0.05, abs=0.015)
    assert len(large) / 4000 == pytest.approx(0.2, abs=0.03)
    assert small[:3] == ["text 3", "text 33", "text 43"]  # as today, so in a year


@pytest.mark.parametrize("kind", ["a.txt", "a.txt.gz", "a.jsonl", "a.json.gz", "a.parquet"])
def test_every_kind_of_input_is_divided_alike(tmp_path, kind):
    texts = [f"text {number}" for number in range(60)]
    path = tmp_path / kind
    if kind == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"body": texts}), path)
    else:
        lines = texts if ".txt" in kind else [json.dumps({"body": text}) for text in texts]
        content = "\n".join([*lines, ""]).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    train, validation, report = hold_out([path], tmp_path / "out", field="body", on_error="skip")
    assert validation == [text for text in texts if sources._is_held_out(text, 0.3)]
    assert train == [text for text in texts if text not in validation] and validation
    assert report.skipped == {}


def test_bad_documents_are_skipped_once_for_both_sides(tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("\n".join(f"text {number}\n " for number in range(30)))
    train, validation, report = hold_out([source], tmp_path / "out", on_error="skip")
    assert len(train) + len(validation) == 30 and report.skipped == {"empty": 30}


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.0, "--held-out 0.0 is not above 0 and below 1; try 0.01"),
        (1.0, "--held-out 1.0 is not above 0"),
        (-0.1, "--held-out -0.1 is not above 0"),
        (float("nan"), "--held-out nan is not above 0"),
        (1e-9, "--held-out 1e-09 leaves none of 20 documents in validation; raise it, or"),
        (1 - 1e-9, "leaves none of 20 documents in train; lower it, or pack more of different"),
    ],
)
def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path, share, message):
    source = tmp_path / "source.txt"
    source.write_text("".join(f"text {number}\n" for number in range(20)))
    with pytest.raises(ValueError, match=re.escape(message)):
        pack([source], tmp_path / "out", held_out=share)
    assert os.listdir(tmp_path) == ["source.txt"]


def test_too_few_texts_beside_those_held_out_are_named(tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("".join(f"text {number}\n" for number in range(20)))
    train, _, _ = hold_out([source], tmp_path / "out", shards=1)
    with pytest.raises(ValueError, match=f"only {len(train)} documents for 20 shards"):
        pack([source], tmp_path / "other", held_out=0.3, shards=20)


def test_what_divides_a_corpus_says_what_to_train_with(tmp_path, capsys):
    source, out = tmp_path / "source.txt", tmp_path / "out"
    source.write_text("".join(f"text {number}\n" for number in range(50)))
    options = ["--out", str(out), "--language", LANGUAGE, "--held-out", "0.2", "--shards", "2"]
    assert main(["shards", "pack", str(source), *options]) == 0
    train, validation, words = capsys.readouterr().out.splitlines()
    assert train.startswith(f"{out / 'train'}: ") and validation.startswith(f"{out}/validation: ")
    assert words == (
        "train with both: mtllm train CONFIG"
        f" data.train={out}/train validation.corpus={out}/validation"
    )
    assert main(["shards", "verify", str(out / "validation")]) == 0
    capsys.readouterr()
    assert main(["shards", "show", str(out)]) == 1
    assert capsys.readouterr().err == (
        f"mtllm: error: {out} holds two corpora; name {out}/train or {out}/validation\n"
    )


def test_a_packing_killed_half_way_leaves_no_corpus_and_is_done_again(tmp_path):
    source, out = tmp_path / "source.jsonl", tmp_path / "out"
    source.write_text("".join(f'{{"text": "text {number}"}}\n' for number in range(50)))
    kills = (
        "import os, signal; from mtllm_engine.data import sources; write = sources._write_shard\n"
        "def once(path, samples):\n"
        "    write(path, samples); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sources._write_shard = once; sources.pack([{str(source)!r}], {str(out)!r},"
        " language='eng_Latn', shards=2, held_out=0.3, progress=False)"
    )
    assert subprocess.run([sys.executable, "-c", kills]).returncode == -signal.SIGKILL
    assert not out.exists() and len(os.listdir(tmp_path)) == 2  # the source and a hidden draft
    hold_out([source], out)
    assert sorted(os.listdir(tmp_path)) == ["out", "source.jsonl"]


def test_memory_does_not_grow_with_the_texts(tmp_path):
    peaks = []
    for count in (400, 4000):
        source = tmp_path / f"{count}.txt"
        source.write_text("".join(f"text {number}\n" for number in range(count)))
        tracemalloc.start()
        pack([source], tmp_path / f"out-{count}", held_out=0.5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 200_000


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, capfd):
    source = tmp_path / "a.txt"
    source.write_text("a document\n" * 300)
    child = in_child(pack_on_full_disk, source, tmp_path / "corpus")
    child.join()
    lines = capfd.readouterr().err.splitlines()
    assert child.exitcode == 1
    assert lines == [
        f"mtllm: error: packing into {tmp_path}/corpus failed: File too large; nothing was written"
    ]
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """A folder that gets a file each time a shard is indexed, in whatever process."""
    folder, build = tmp_path / "checks", tars.build_index
    folder.mkdir()

    def slow_build(*arguments):
        tempfile.mkstemp(dir=folder)
        time.sleep(0.2)
        return build(*arguments)

    monkeypatch.setattr(tars, "build_index", slow_build)
    return folder


def test_ranks_that_start_together_index_a_shard_once(corpus_folder, checks):
    ranks = [in_child(Corpus(corpus_folder).read, 1, 0) for _ in range(3)]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert len(os.listdir(checks)) == 1
    Corpus(corpus_folder).read(1, 0)
    assert len(os.listdir(checks)) == 1


def test_index_is_mapped_by_its_first_reader_too(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    corpus = Corpus(corpus_folder)
    corpus.read(0, 0)
    assert f"{tmp_path}/cache/mtllm/" in Path("/proc/self/maps").read_text()


def test_changed_shard_is_checked_again(corpus_folder, checks):
    Corpus(corpus_folder).read(1, 0)
    flip(BLOCK)(corpus_folder / "000001.tar")
    with pytest.raises(DamagedShardError, match="sha256"):
        Corpus(corpus_folder).read(1, 0)


def test_spoilt_index_is_made_again(corpus_folder, checks, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Corpus(corpus_folder).read(0, 0)
    (index,) = (tmp_path / "cache" / "mtllm").glob("*.npy")
    os.truncate(index, 20)
    assert Corpus(corpus_folder).read(0, 0).text == "document 00"
    assert len(os.listdir(checks)) == 2


def new_run(patch):
    """As in a process that starts now: what was checked before was checked by other runs."""
    now = time.time()
    patch.setattr(files, "_run_start", lambda: now)


def kept_times(change, path):
    """Changes a file as a disk does: size and times stay."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_bit(position, bit):
    def apply(path):
        content = bytearray(path.read_bytes())
        content[position % len(content)] ^= 1 << bit
        path.write_bytes(content)

    return apply


POSITION, BIT = st.integers(0, 1 << 20), st.integers(0, 7)


@given(number=st.integers(0, 100), position=POSITION | st.integers(0, 200), bit=BIT)
def test_a_flipped_bit_of_the_cache_changes_nothing(cached, number, position, bit):
    """Of an index: it is made again. Of the record of a check: the check is, too."""
    folder, cache, texts = cached
    damaged = cache[number % len(cache)]
    kept_times(flip_bit(position, bit), damaged)
    assert read_all(folder) == texts
    assert files.is_sealed(damaged)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A corpus, the files that its reading left in the cache, and what was read."""
    folder = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        (folder / "a.txt").write_text("".join(f"text {number}\n" for number in range(9)))
        pack([folder / "a.txt"], folder / "corpus")
        texts = read_all(folder / "corpus")
        cache = [path for path in (folder / "cache" / "mtllm").iterdir() if path.stat().st_size]
        assert sorted(path.suffix for path in cache) == 2 * [".checked"] + 2 * [".npy"]
        yield folder / "corpus", cache, texts


def test_a_cached_file_under_the_name_of_another_is_made_again(cached):
    folder, cache, texts = cached
    first, second = (path for path in cache if path.suffix == ".npy")
    first.write_bytes(second.read_bytes())
    assert read_all(folder) == texts


@settings(max_examples=20)
@given(position=POSITION, bit=BIT)
def test_a_shard_damaged_between_two_runs_is_found(cached, position, bit):
    """Though its size and times are what they were when it was found sound."""
    folder, _, texts = cached
    shard = folder / "000001.tar"
    before = shard.read_bytes()
    assert read_all(folder) == texts
    kept_times(flip_bit(position, bit), shard)
    with pytest.MonkeyPatch.context() as patch:
        new_run(patch)
        with pytest.raises(DamagedShardError, match=r"000001\.tar does not match its sha256"):
            read_all(folder)
    kept_times(lambda path: path.write_bytes(before), shard)


def test_a_shard_is_read_whole_once_a_run(corpus_folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        tars, "sha256_of", lambda path: hashed.append(path.name) or files.sha256_of(path)
    )
    monkeypatch.setattr(tars, "build_index", count_calls(tars.build_index, indexed := []))
    for run in (1, 2):
        new_run(monkeypatch)
        for _ in range(2):
            read_all(corpus_folder)
            assert sorted(hashed) == sorted(run * ["000000.tar", "000001.tar", "000002.tar"])
    assert len(indexed) == 3


def count_calls(function, calls):
    return lambda *arguments: calls.append(arguments) or function(*arguments)


def test_show_says_when_a_shard_was_last_checked(corpus_folder, monkeypatch):
    assert show(corpus_folder).count("not checked on this machine") == 3
    new_run(monkeypatch)
    rows = show(corpus_folder).splitlines()
    assert sum("found sound 20" in row for row in rows) == 1  # the one whose texts were shown
    verify(corpus_folder, progress=False)
    assert show(corpus_folder).count("found sound 20") == 3
    flip(BLOCK)(corpus_folder / "000002.tar")
    assert "not checked" in show(corpus_folder)


NUMBERS = st.integers(-3, 8) | st.sampled_from([10240, 1 << 31, 1 << 63, 10**30])


@given(number=st.integers(0, 1), samples=NUMBERS, num_bytes=NUMBERS)
@example(number=0, samples=0, num_bytes=10240)
@example(number=0, samples=-5, num_bytes=10240)
@example(number=1, samples=3, num_bytes=10240)
def test_numbers_that_are_not_the_tars_are_refused(cached, number, samples, num_bytes):
    """None that a manifest says leaves documents out in silence, or ends in a traceback."""
    folder, _, texts = cached
    content = json.loads(unsigned((folder / "manifest.json").read_text()))
    shard = content["shards"][number]
    is_true = (shard["samples"], shard["bytes"]) == (samples, num_bytes)
    shard |= {"samples": samples, "bytes": num_bytes}
    with tempfile.TemporaryDirectory() as name:
        for tar in folder.glob("*.tar"):
            os.link(tar, Path(name) / tar.name)
        (Path(name) / "manifest.json").write_text(json.dumps(content))
        if is_true:
            assert read_all(name) == texts
            return
        with pytest.raises(ValueError, match=shard["name"]) as error:
            read_all(name)
    assert "\n" not in str(error.value)


def test_a_tar_without_samples_is_a_shard_without_samples(corpus_folder):
    write_tar(corpus_folder / "000003.tar", [])
    assert [shard.samples for shard in import_(corpus_folder).shards] == [4, 4, 4, 0]
    assert len(read_all(corpus_folder)) == 12 and verify(corpus_folder, progress=False) == []


@given(position=st.integers(0, 1 << 20), bit=BIT)
def test_a_flipped_bit_of_a_manifest_is_noticed_or_without_effect(cached, position, bit):
    folder, _, texts = cached
    path = folder / "manifest.json"
    before, whole = Manifest.load(folder), path.read_bytes()
    flip_bit(position, bit)(path)
    try:
        with contextlib.suppress(ValueError):
            assert Manifest.load(folder) == before
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("changed", [("eng_Latn", "swh_Latn"), ("unknown", "CC0"), ("txt", "json")])
def test_a_manifest_is_changed_by_hand_on_purpose_only(corpus_folder, changed):
    path = corpus_folder / "manifest.json"
    path.write_text(path.read_text().replace(*changed))
    with pytest.raises(
        ValueError, match=r"manifest\.json is not what was saved; .* `fingerprint`$"
    ):
        Manifest.load(corpus_folder)
    path.write_text(unsigned(path.read_text()))
    assert changed[1] in str(Manifest.load(corpus_folder))


HOSTILE = ["../x.tar", "/x.tar", "..", ".", "", "a/b.tar", "a/../../x.tar", "x\0.tar", "\ud800"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("action", ["show", "verify"])
def test_a_shards_name_is_no_path(corpus_folder, name, action, capsys):
    before = everything_below(corpus_folder.parent)
    path = corpus_folder / "manifest.json"
    path.write_text(path.read_text().replace('"000001.tar"', json.dumps(name)))
    (corpus_folder.parent / "x.tar").write_bytes((corpus_folder / "000001.tar").read_bytes())
    assert main(["shards", action, str(corpus_folder)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "the name of a shard must be the name" in err
    (corpus_folder.parent / "x.tar").unlink()
    path.write_bytes(before[path])
    assert everything_below(corpus_folder.parent) == before


def everything_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_shards_of_one_name_are_refused(corpus_folder):
    path = corpus_folder / "manifest.json"
    path.write_text(path.read_text().replace("000001.tar", "000002.tar"))
    with pytest.raises(ValueError, match=r"manifest\.json: 2 shards have the name 000002\.tar"):
        Manifest.load(corpus_folder)


def test_cache_falls_back_to_the_temp_folder(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(corpus_folder / "manifest.json"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Corpus(corpus_folder).read(0, 0).text == "document 00"
    assert len(list(tmp_path.glob("mtllm-*/*.npy"))) == 1


def test_open_shards_are_bounded(corpus_folder, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)
    corpus = Corpus(corpus_folder)
    for shard in (0, 1, 0, 2, 0, 1, 2):
        assert corpus.read(shard, 1).text == f"document {4 * shard + 1:02d}"
        open_files = [
            os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()
        ]
        assert sum(name.startswith(str(corpus_folder)) for name in open_files) <= 2
    corpus.close()


def test_manifest_round_trip(tmp_path):
    shards = tuple(Shard(name=f"{n}.tar", samples=n, bytes=1024, sha256="é") for n in (0, 2))
    manifest = Manifest(language=LANGUAGE, licence="CC0", fields={"text": "json.a"}, shards=shards)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest and manifest.samples == 2
    assert os.listdir(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mtllm-shards/1", "mtllm-shards/2", "has format 'mtllm-shards/2', not 'mtllm-shards/1'"),
        ('"samples": 4', '"samples": "4"', "samples should be of type int, not '4'"),
        ('"text": "txt"', '"txt": "txt"', "text should be of type str, not None"),
        ('"shards": [', '"shards": [3, ', "expected a table, not 3"),
        ("{", "", "is not JSON"),
        ("{", "[{", "is not JSON"),
    ],
)
def test_unusable_manifest(corpus_folder, old, new, message):
    path = corpus_folder / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        Manifest.load(corpus_folder)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_no_manifest_names_the_commands(tmp_path):
    with pytest.raises(
        ValueError, match=f"no manifest.json in {tmp_path}; .*shards pack.*shards import"
    ):
        Corpus(tmp_path)


def test_import_names_the_members_there_are(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.json", b"{}"), ("a.cls", b"1")])
    with pytest.raises(ValueError, match="no member 'txt' .*: json, cls"):
        import_(tmp_path)
    with pytest.raises(ValueError, match=r"no \.tar files"):
        import_(tmp_path / "absent")


def test_show(corpus_folder):
    text = show(corpus_folder, samples=2)
    for words in (LANGUAGE, "000002.tar    4 samples, 10240 bytes", "0000000001    document 01"):
        assert words in text
    assert "document 02" not in text


def test_cli_pack_show_verify_import(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    out = str(tmp_path / "out")
    arguments = ["--out", out, "--language", LANGUAGE, "--shards", "2", "--on-error", "skip"]
    assert main(["shards", "pack", str(tmp_path / "a.txt"), *arguments]) == 0
    assert (
        f"{out}: 2 {LANGUAGE} documents in 2 shards, 20480 bytes\n  skipped 1: empty"
        in capsys.readouterr().out
    )
    assert main(["shards", "show", out]) == 0
    (tmp_path / "out" / "extra.csv").write_text("x")
    write_tar(tmp_path / "out" / "000002.tar", [("a.txt", b"a"), ("b.txt", b"b"), ("a.json", b"1")])
    capsys.readouterr()
    assert main(["shards", "import", out, "--language", LANGUAGE]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{out}: 5 {LANGUAGE} documents in 3 shards, 30720 bytes"
    assert rest == [
        "  not usable 1: no member 'txt', such as a in 000002.tar",
        "  repeated 1: a key of another sample, such as a in 000002.tar; members of one sample "
        "that do not follow one another are two samples: sort the tar",
        "  files left out 1: .csv",
    ]
    (tmp_path / "out" / "000002.tar").unlink()
    assert main(["shards", "import", out, "--language", "swh_Latn", "--licence", "CC0"]) == 0
    assert main(["shards", "verify", out]) == 0
    assert Manifest.load(out).language == "swh_Latn"
    (tmp_path / "out" / "000001.tar").unlink()
    capsys.readouterr()
    assert main(["shards", "verify", out]) == 1
    assert capsys.readouterr().out == f"shard {out}/000001.tar is missing\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack", "absent.txt", "--out", "out", "--language", LANGUAGE],
        ["pack", "absent.txt", "--out", "out", "--language", "english"],
        ["import", "absent", "--language", LANGUAGE],
        ["import", "absent", "--language", "xx"],
        ["verify", "absent"],
        ["show", "absent"],
    ],
)
def test_cli_error_is_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["shards", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mtllm: error: ") and err.count("\n") == 1


def test_command_starts_without_torch():
    loaded = "'torch' in sys.modules or 'webdataset' in sys.modules"
    code = f"import sys, mtllm_engine.cli; sys.exit({loaded})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FIELDS = {name: f"json.{name}" for name in ("text", "label", "spans", "answers", "cut")}
WHOLE = {"text": "a b c", "label": 1, "spans": [[0, 1], [2, 5]], "answers": [[2, 3]], "cut": [0, 1]}


def write_examples(folder, objects, fields=FIELDS):
    sources.pack_json(
        ((str(n), value) for n, value in enumerate(objects)),
        folder,
        fields=fields,
        language=LANGUAGE,
    )
    return folder


def test_annotations_are_read_with_their_text(tmp_path):
    none = WHOLE | {"label": -1, "spans": [], "answers": [], "cut": None}
    corpus = Corpus(write_examples(tmp_path / "corpus", [WHOLE, none]))
    assert corpus.read(0, 0) == ("0", "a b c")
    expected = Annotations(label=1, spans=((0, 1), (2, 5)), answers=((2, 3),), cut=(0, 1))
    assert corpus.read_example(0, 0) == (("0", "a b c"), expected)
    assert (
        corpus.read_example(0, 1)[1] == Annotations()
        and not corpus.read_example(0, 1)[1].has_ranges
    )
    assert Manifest.load(tmp_path / "corpus").fields == FIELDS
    assert (
        "json.spans" in show(tmp_path / "corpus")
        and verify(tmp_path / "corpus", progress=False) == []
    )
    assert [json.loads(sample["json"]) for sample in plain_webdataset(tmp_path / "corpus")] == [
        WHOLE,
        none,
    ]


def test_annotations_may_lie_deeper_and_be_some_only(tmp_path):
    fields = {"text": "json.body.text", "label": "json.gold"}
    corpus = Corpus(
        write_examples(
            tmp_path / "corpus", [{"body": {"text": "a"}, "gold": 2, "spans": 3}], fields
        )
    )
    assert corpus.read_example(0, 0) == (("0", "a"), Annotations(label=2))


def test_plain_documents_have_no_annotations(corpus_folder):
    assert Corpus(corpus_folder).read_example(1, 0) == (
        ("0000000004", "document 04"),
        Annotations(),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "1"}, "label should be a whole number, -1 or above, not '1'"),
        ({"label": -2}, "label should be a whole number, -1 or above, not -2"),
        ({"label": True}, "label should be a whole number, -1 or above, not True"),
        (
            {"spans": [[0, 1], [2]]},
            r"spans should hold \[start, end\) of two whole numbers, not \[2\]",
        ),
        ({"spans": [[0, 1.0]]}, r"spans should hold \[start, end\) of two whole numbers"),
        ({"spans": "no"}, r"spans should be a list of \[start, end\), not 'no'"),
        ({"spans": None}, r"spans should be a list of \[start, end\), not None"),
        ({"spans": [[2, 5], [0, 1]]}, "spans: one starts at 0, before the one before it ends at 5"),
        ({"answers": [[3, 6]]}, r"answers: \[3, 6\) is not in the text's 5 characters"),
        ({"cut": [4, 3]}, r"cut: \[4, 3\) is not in the text's 5 characters"),
        ({"cut": 3}, r"cut should hold \[start, end\) of two whole numbers, not 3"),
        ({"label": ...}, "no field 'label'"),
    ],
)
def test_bad_annotations_are_bad_documents(tmp_path, change, message):
    changed = {name: value for name, value in (WHOLE | change).items() if value is not ...}
    corpus = Corpus(write_examples(tmp_path / "corpus", [WHOLE, changed]))
    assert corpus.read_example(0, 0)[1].label == 1
    with pytest.raises(BadDocumentError, match=rf"^shard .*000000\.tar, key 1: {message}") as error:
        corpus.read(0, 1)
    assert "\n" not in str(error.value)
    assert verify(tmp_path / "corpus", progress=False) == [str(error.value)]


@pytest.mark.parametrize("field", ["txt", "meta.json.spans"])
def test_annotations_elsewhere_than_the_text_are_refused(tmp_path, field):
    write_examples(tmp_path / "corpus", [WHOLE], FIELDS | {"spans": field})
    member = r"the same JSON member as fields\.text='json\.text'"
    message = rf"manifest\.json: fields\.spans='{field}' is not in {member}"
    with pytest.raises(ValueError, match=message):
        Corpus(tmp_path / "corpus")


def test_fields_that_are_no_annotations_are_left_alone(corpus_folder):
    path = corpus_folder / "manifest.json"
    before = Manifest.load(corpus_folder)
    path.write_text(path.read_text().replace('"text": "txt"', '"text": "txt", "url": "json.url"'))
    assert Manifest.load(corpus_folder) == before
    path.write_text(path.read_text().replace('"url": "json.url"', '"label": 3'))
    with pytest.raises(ValueError, match="label should be of type str, not 3"):
        Corpus(corpus_folder)
