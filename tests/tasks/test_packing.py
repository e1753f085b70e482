"""A task's packed split says what its files say now, and nothing that lies beside it is lost."""

import shutil
from pathlib import Path

import pytest

from mtllm_engine import tasks
from mtllm_engine.data.shards import Corpus, Manifest
from mtllm_engine.tasks import RECORD, digest_now, digest_packed, load_task, pack_split

TASK = load_task("sib200")


@pytest.fixture
def source(tmp_path: Path) -> str:
    write(tmp_path, "first")
    return f"sib200:{tmp_path}/topics"


def write(folder: Path, *texts: str) -> None:
    path = folder / "topics" / "eng_Latn" / "train.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{key}\ttravel\t{text}\n" for key, text in enumerate(texts)]
    path.write_text("".join(["index_id\tcategory\ttext\n", *rows]))


def is_outdated(source: str, corpus: Path) -> bool:
    return digest_packed(corpus) != digest_now(TASK, source, "train", "eng_Latn")


def packed(source: str, folder: Path) -> list[str]:
    corpus = Corpus(pack_split(TASK, source, "train", "eng_Latn", folder / "corpus"))
    count = corpus.manifest.samples
    texts = [corpus.read(0, index).text for index in range(count)]
    corpus.close()
    return texts


def test_files_that_changed_are_packed_anew_and_what_lies_beside_stays(source: str, tmp_path: Path):
    corpus = tmp_path / "corpus"
    assert packed(source, tmp_path) == ["first"]
    before = Manifest.load(corpus).fingerprint
    (corpus / "teacher_states-x").mkdir()
    (corpus / "teacher_states-x" / "000000.tar.npy").write_bytes(b"states")
    assert not is_outdated(source, corpus)
    write(tmp_path, "other", "second")
    assert is_outdated(source, corpus)
    assert packed(source, tmp_path) == ["other", "second"]
    assert not is_outdated(source, corpus)
    write(tmp_path, "first")
    assert packed(source, tmp_path) == ["first"]
    assert Manifest.load(corpus).fingerprint == before
    assert (corpus / "teacher_states-x" / "000000.tar.npy").read_bytes() == b"states"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "topics"]


def test_a_corpus_of_the_same_content_is_left_as_it_is(source: str, tmp_path: Path, monkeypatch):
    packed(source, tmp_path)
    (tmp_path / "topics" / "eng_Latn" / "train.tsv").touch()
    monkeypatch.setattr(tasks, "pack", lambda *args, **options: pytest.fail("packed anew"))
    assert packed(source, tmp_path) == ["first"]


def test_what_an_earlier_version_packed_is_packed_anew(source: str, tmp_path: Path):
    """It noted where from, not what: an older reader may have made anything of it."""
    packed(source, tmp_path)
    record = tmp_path / "corpus" / RECORD
    record.write_text(record.read_text().split("\n")[0] + "\n")
    assert digest_packed(tmp_path / "corpus") is None
    write(tmp_path, "second")
    assert packed(source, tmp_path) == ["second"]


@pytest.mark.parametrize("left", [(), (RECORD,), (RECORD, "000000.tar"), (RECORD, "manifest.json")])
def test_packing_that_was_killed_is_done_anew(source: str, tmp_path: Path, left: tuple[str, ...]):
    """Whatever of it is there; the digest is written last."""
    packed(source, tmp_path)
    corpus = tmp_path / "corpus"
    record = corpus / RECORD
    record.write_text(record.read_text().split("\n")[0] + "\n")
    for path in list(corpus.iterdir()):
        if path.name not in left:
            path.unlink()
    assert packed(source, tmp_path) == ["first"]


def test_a_folder_of_something_else_is_left_alone(source: str, tmp_path: Path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="corpus is already there and not empty; remove it or "):
        packed(source, tmp_path)
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == ["thesis.tex"]


def test_a_label_that_does_not_exist_is_named_however_often_one_was_packed(
    source: str, tmp_path: Path
):
    packed(source, tmp_path)
    path = tmp_path / "topics" / "eng_Latn" / "train.tsv"
    path.write_text(path.read_text().replace("travel", "nonsense"))
    with pytest.raises(ValueError, match=r"train.tsv:2: column 'category' should be one of"):
        packed(source, tmp_path)
    assert is_outdated(source, tmp_path / "corpus")
    shutil.rmtree(tmp_path / "topics")
    assert digest_now(TASK, source, "train", "eng_Latn") is None
