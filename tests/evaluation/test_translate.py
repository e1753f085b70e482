"""Translation: what a text becomes depends on neither its company, nor its rank, nor on which run
asked first; examples stay what they are."""

import functools
import itertools
import json
import multiprocessing
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, M2M100ForConditionalGeneration

from mtllm_engine.data.parts import find_parts
from mtllm_engine.evaluation import translate as translation
from mtllm_engine.evaluation.translate import (
    ROUND,
    Translations,
    Translator,
    plan_batches,
    rank_rounds,
    translate,
    translate_examples,
)
from mtllm_engine.tasks import Example, join
from mtllm_engine.tasks.belebele import compose
from tests.support.machine import HANG_S
from tests.support.scripts import SENTENCES
from tests.support.tiny import build_decoder, build_encoder, build_world

SOURCE = "swh_Latn"
KINDS = ("lines", "sentences")
POSITIONS = 12
LEARNED = {
    "two words": "words two",
    "import def": "def",
    "a": "return a random self",
    "return random text": "seed",
    "self seed": "random words",
    "the longest of them goes beyond twelve tokens": (
        "and what becomes of it is longer too than the model may write"
    ),
}
SHORT = list(LEARNED)
TEXTS = [*SHORT, "", "  ", "a"]
UNLEARNED = "fra_Latn"
LINE = st.text("ab xé漢1.,!?  ", min_size=1, max_size=12).filter(str.strip)
TEXT = st.lists(LINE, min_size=1, max_size=3).map("\n".join)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A translator of few positions that has learned six texts by heart."""
    folder = build_encoder(tmp_path_factory.mktemp("translator"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    model = M2M100ForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, src_lang=SOURCE, tgt_lang="eng_Latn")
    pairs = {"text": SHORT, "text_target": list(LEARNED.values())}
    options = {"return_tensors": "pt", "padding": True, "truncation": True}
    batch = tokenizer(**pairs, **options, max_length=POSITIONS + 8)
    ids_BL, mask_BL = batch["input_ids"][:, :POSITIONS], batch["attention_mask"][:, :POSITIONS]
    labels_BL = batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(ids_BL, mask_BL, labels=labels_BL).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Callable[..., list[str]]:
    """What transformers itself makes of each of SHORT alone."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, src_lang=SOURCE)
    model = M2M100ForConditionalGeneration.from_pretrained(checkpoint).eval()

    @functools.cache
    def translations(target: str, num_beams: int, growth: float = 100.0) -> list[str]:
        texts = []
        options = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(target)}
        options |= {"num_beams": num_beams}
        for text in SHORT:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=POSITIONS)
            longest = min(POSITIONS - 1, int(growth * ids["input_ids"].shape[1]))
            ids_BL = model.generate(**ids, **options, max_new_tokens=longest)
            texts += tokenizer.batch_decode(ids_BL, skip_special_tokens=True)
        return list(map(str.strip, texts))

    return translations


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("max_tokens", [1, 130, 100_000])
def test_translations_are_those_of_one_by_one(checkpoint, alone, tmp_path, num_beams, max_tokens):
    options = {"max_tokens": max_tokens, "num_beams": num_beams, "cache": tmp_path}
    translator = Translator(checkpoint, world=build_world(), **options)
    first = translator(TEXTS, source=SOURCE)
    expected = alone("eng_Latn", num_beams)
    assert list(first.texts) == [*expected, "", "  ", expected[2]]
    assert first.texts[:5] == tuple(LEARNED.values())[:5]
    assert LEARNED[SHORT[5]].startswith(first.texts[5])
    assert (first.translated, first.cached, first.cut, first.unfinished) == (6, 0, 1, 1)
    assert first.cut_texts == first.unfinished_texts == {SHORT[5]}  # the longest
    assert first.wall_s > 0
    second = translator(SHORT, source=SOURCE, target=UNLEARNED)
    assert list(second.texts) == alone(UNLEARNED, num_beams)


def test_a_text_stops_at_its_own_limit_whatever_is_beside_it(
    checkpoint, alone, tmp_path, monkeypatch
):
    monkeypatch.setattr(translation, "GROWTH", 1)
    monkeypatch.setattr(translation, "SLACK", 0)
    translations = run(checkpoint, tmp_path, SHORT)
    assert list(translations.texts) == alone("eng_Latn", 1, growth=1.0)
    assert translations.unfinished == 3  # "a", "self seed" and the longest


@pytest.mark.parametrize("num_beams", [1, 3])
def test_every_beam_of_a_text_stops_at_its_limit(num_beams):
    stops = translation._OwnLimit(torch.tensor([2, 4]))
    for num_new in range(1, 5):
        expected = [num_new >= 2, num_new >= 4]
        stopped = stops(torch.zeros(2 * num_beams, 1 + num_new), None)
        assert stopped.tolist() == [stop for stop in expected for _ in range(num_beams)]


def test_what_is_beyond_the_limit_changes_nothing(checkpoint, tmp_path):
    endings = ["tokens", "seed and text", "random"]
    longer = [f"the longest of them goes beyond twelve {ending}" for ending in endings]
    translator = Translator(checkpoint, cache=tmp_path, world=build_world())
    translations = translator(longer, source="deu_Latn", target=UNLEARNED)
    assert len(set(translations.texts)) == 1 and translations.cut == 3


def test_tokens_are_counted_to_the_end_token(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    words = tokenizer(LEARNED["self seed"], add_special_tokens=False)["input_ids"]
    translations = run(checkpoint, tmp_path, ["self seed"])
    assert translations.texts == (LEARNED["self seed"],)
    assert translations.tokens == len(words) + 1


def test_what_is_cached_is_read_and_the_model_is_not_even_loaded(checkpoint, tmp_path):
    first = run(checkpoint, tmp_path, SHORT[:4])
    before = [path.read_bytes() for path in tmp_path.iterdir()]
    translator = Translator(checkpoint, cache=tmp_path, world=build_world())
    again = translator(SHORT[3::-1], source=SOURCE)
    assert again.texts == first.texts[::-1]
    assert (again.translated, again.cached, again.tokens) == (0, 4, 0)
    assert again.wall_s == pytest.approx(first.wall_s) and first.wall_s > 0
    assert "_model" not in vars(translator)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == before
    more = run(checkpoint, tmp_path, SHORT)
    assert (more.translated, more.cached, more.cut, more.unfinished) == (2, 4, 1, 1)
    cached = run(checkpoint, tmp_path, SHORT)
    assert (cached.translated, cached.cached, cached.cut, cached.unfinished) == (0, 6, 1, 1)
    assert cached.cut_texts == cached.unfinished_texts == {SHORT[5]}


def test_seconds_are_those_of_translating_whoever_did_it(checkpoint, tmp_path, monkeypatch):
    """By a clock that only the model moves: 100 s to load it, 2 s a batch, here of one text."""
    now_s = [0.0]

    def taking(seconds: float, function: Callable) -> Callable:
        def slow(*args, **options):
            now_s[0] += seconds
            return function(*args, **options)

        return slow

    monkeypatch.setattr(translation, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    monkeypatch.setattr(translation, "_load", taking(100.0, translation._load))
    monkeypatch.setattr(Translator, "_generate", taking(2.0, Translator._generate))
    options = {"cache": tmp_path, "world": build_world(), "max_tokens": 1}
    assert Translator(checkpoint, **options)(SHORT[:4], source=SOURCE).wall_s == pytest.approx(8.0)
    translator = Translator(checkpoint, **options)
    assert translator(SHORT[:3], source=SOURCE).wall_s == pytest.approx(6.0)
    assert translator(SHORT, source=SOURCE).wall_s == pytest.approx(12.0)


def test_each_language_pair_setting_and_checkpoint_has_a_cache_file(checkpoint, tmp_path):
    translator = Translator(checkpoint, cache=tmp_path, world=build_world())
    for source, target in ((SOURCE, "eng_Latn"), ("deu_Latn", "eng_Latn"), (SOURCE, "fra_Latn")):
        assert translator(["a"], source=source, target=target).translated == 1
    beams = Translator(checkpoint, cache=tmp_path, world=build_world(), num_beams=2)
    assert beams(["a"], source=SOURCE).translated == 1
    other = build_encoder(tmp_path / "other", samples=["other words"])
    assert run(other, tmp_path, ["a"]).translated == 1
    assert len(list(tmp_path.glob("*.jsonl"))) == 5


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda lines: [*lines[:3], lines[3].replace(b"def", b"def,"), *lines[4:]], 1),
        (lambda lines: [*lines[:3], lines[3].replace(b'"crc32": ', b'"crc32": 1'), *lines[4:]], 1),
        (lambda lines: [*lines[:-1], lines[-1][:-9]], 1),
        (lambda lines: [*lines[:-1], lines[-1][:-1]], 0),  # all was written but the line's end
        (lambda lines: [*lines[:-1], b"\xff\n"], 1),
    ],
    ids=["translation", "checksum", "half a line", "line end", "no text"],
)
def test_a_damaged_line_is_translated_again(checkpoint, tmp_path, damage, lost):
    first = run(checkpoint, tmp_path, SHORT[:4])
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    again = run(checkpoint, tmp_path, SHORT)
    assert again.texts[:4] == first.texts
    assert (again.translated, again.cached) == (2 + lost, 4 - lost)
    assert run(checkpoint, tmp_path, SHORT).cached == 6


def test_a_killed_run_keeps_what_it_had_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(translation, "ROUND", 1)
    translator = Translator(checkpoint, cache=tmp_path, world=build_world(), max_tokens=1)
    generate, calls = translator._model.generate, iter(range(9))

    def interrupted(*args, **options):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(translator._model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        translator(SHORT, source=SOURCE)
    again = run(checkpoint, tmp_path, SHORT)
    assert (again.translated, again.cached) == (3, 3)


def test_what_cannot_be_translated_is_refused(checkpoint, tmp_path):
    translator = Translator(checkpoint, cache=tmp_path / "cache", world=build_world())
    with pytest.raises(ValueError, match="unknown language 'swa_Latn'; did you mean .*swh_Latn"):
        translator(["a"], source="swa_Latn")
    with pytest.raises(ValueError, match="unknown language 'en'"):
        translator(["a"], source=SOURCE, target="en")
    for languages in ({"source": "arb_Latn"}, {"source": SOURCE, "target": "arb_Latn"}):
        with pytest.raises(ValueError, match="has no token for the language arb_Latn"):
            translator(["a"], **languages)
    with pytest.raises(ValueError, match="text 1 has a line break; translate its lines"):
        translator(["a", "premise\nhypothesis"], source=SOURCE)
    assert not (tmp_path / "cache").exists()


def test_santali_goes_by_the_name_that_nllb_gives_it(checkpoint, tmp_path):
    translator = Translator(checkpoint, cache=tmp_path, world=build_world())
    assert translator(["a"], source="sat_Olck").translated == 1


def test_what_is_no_translator_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a model|is no model"):
        run(tmp_path, tmp_path / "cache", ["a"])
    with pytest.raises(ValueError, match="num_beams=0 and max_tokens=8192 must be at least 1"):
        Translator(checkpoint, cache=tmp_path, world=build_world(), num_beams=0)
    encoder = shutil.copytree(checkpoint, tmp_path / "encoder")
    tensors = safetensors.torch.load_file(encoder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "decoder" not in name}
    safetensors.torch.save_file(kept, encoder / "model.safetensors", {"format": "pt"})
    message = "is no complete translator: it has no tensor model.decoder"
    with pytest.raises(ValueError, match=message):
        run(encoder, tmp_path / "cache", ["a"])
    llama = build_decoder(tmp_path / "llama")
    (encoder / "config.json").write_text((llama / "config.json").read_text())
    message = "cannot load a translator from .* a llama model; this takes m2m_100"
    with pytest.raises(ValueError, match=message):
        run(encoder, tmp_path / "cache", ["a"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda weight: weight.to(torch.int8),
            "/model.safetensors: .*fc1.weight has the dtype I8; this takes",
        ),
        (
            lambda weight: weight.to(torch.float8_e4m3fn),
            "/model.safetensors: .*fc1.weight has the dtype F8_E4M3; this takes",
        ),
        (lambda weight: weight * float("nan"), ": .*fc1.weight has values that are NaN"),
    ],
    ids=["int8", "float8", "nan"],
)
def test_weights_that_are_no_finite_floats_are_refused(checkpoint, tmp_path, edit, message):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("decoder.layers.0.fc1.weight"))
    tensors[name] = edit(tensors[name])
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "cache", ["a"])


def test_a_control_token_spelled_in_a_text_is_its_characters(checkpoint, tmp_path):
    translator = Translator(checkpoint, cache=tmp_path, world=build_world())
    tokenizer = translator._tokenizer
    control = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    texts = ["<s>", "</s>", "a <pad> b", f"{SOURCE} a", "eng_Latn</s></s>", "<mask>", "<unk>"]
    for row in translator._encode(texts, SOURCE):
        assert row[0] == tokenizer.convert_tokens_to_ids(SOURCE)
        assert row[-1] == tokenizer.eos_token_id
        assert not control & set(row[1:-1]) and len(row) > 4


def test_a_cache_that_cannot_be_written_is_one_clear_line(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    message = r"cannot (read|write) the cache .*swh_Latn-eng_Latn-beams1"
    with pytest.raises(ValueError, match=message):
        run(checkpoint, tmp_path / "file", ["a"])


@given(costs=st.lists(st.integers(1, 50), max_size=60), budget=st.integers(1, 200))
def test_batches_keep_the_budget_and_every_text(costs, budget):
    batches = plan_batches(costs, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(costs)))
    spent = [len(batch) * max(costs[index] for index in batch) for batch in batches]
    assert all(cost <= budget or len(batch) == 1 for cost, batch in zip(spent, batches))
    flat = [costs[index] for batch in batches for index in batch]
    assert flat == sorted(costs, reverse=True)
    merged = [len(a) + 1 for a in batches[:-1]]  # no batch could have taken one more
    assert all(size * costs[batch[0]] > budget for size, batch in zip(merged, batches))


@given(num_batches=st.integers(0, 70), size=st.integers(1, 9))
def test_ranks_share_the_batches_in_as_many_rounds(num_batches, size):
    batches = [[index] for index in range(num_batches)]
    shares = [list(rank_rounds(batches, rank, size)) for rank in range(size)]
    assert len({len(rounds) for rounds in shares}) == 1
    assert sorted(batch for rounds in shares for part in rounds for batch in part) == batches
    assert all(len(part) <= ROUND for rounds in shares for part in rounds)
    for parts in zip(*shares):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_two_ranks_translate_together_and_one_writes(checkpoint, alone, tmp_path):
    # A process that imports everything anew costs ten times as much.
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = [(rank, checkpoint, tmp_path, results) for rank in range(2)]
    ranks = [context.Process(target=run_rank, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    try:
        outcomes = [results.get(timeout=HANG_S) for _ in ranks]
        for rank in ranks:
            rank.join(timeout=HANG_S)
    finally:
        for rank in ranks:
            rank.kill()
    expected = alone("eng_Latn", 1)
    for first, second in outcomes:
        assert list(first.texts) == [*expected, "", "  ", expected[2]]
        assert (first.translated, first.cut, second.translated, second.cached) == (6, 1, 0, 6)
        assert first.tokens == outcomes[0][0].tokens > 20
    assert len(list((tmp_path / "0").iterdir())) == 1 and not (tmp_path / "1").exists()


def run_rank(rank: int, checkpoint: Path, folder: Path, results: multiprocessing.Queue) -> None:
    """Joins a world of two, translates twice in batches of one, and hands back both results."""
    torch.set_num_threads(1)  # OpenMP's own threads did not survive the fork
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = replace(build_world(rank, 2), host_group=dist.group.WORLD)
    translator = Translator(checkpoint, cache=folder / str(rank), world=world, max_tokens=1)
    results.put([translator(TEXTS, source=SOURCE) for _ in range(2)])
    world.close()


def run(checkpoint: Path, cache: Path, texts: list[str]) -> Translations:
    return translate(texts, model=checkpoint, source=SOURCE, cache=cache, world=build_world())


class Shouting:
    """Stands for the translator: longer, in capitals, and nothing at all for some texts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str], *, source: str, target: str) -> Translations:
        assert (source, target) == ("swh_Latn", "eng_Latn")
        are_lines = not any("\n" in text or "\r" in text for text in texts)
        assert are_lines, "SentencePiece would read a space"
        self.asked += texts
        counts = {"translated": len(texts), "cached": 0, "cut": 0, "unfinished": 0, "tokens": 0}
        return Translations(texts=tuple(map(shouted, texts)), wall_s=3.0, **counts)


def shouted(core: str) -> str:
    return "" if core.startswith("x") else f"<{core.upper()}>!"


def said(piece: str) -> str:
    """What becomes of a piece without line breaks: white space around it stays, and so does what
    has no letter."""
    core = piece.strip()
    if not any(map(str.isalpha, core)):
        return piece
    before = piece[: len(piece) - len(piece.lstrip())]
    return before + (shouted(core) or core) + piece[len(piece.rstrip()) :]


def lines_said(text: str) -> str:
    return "\n".join(map(said, text.split("\n")))


def translated(*examples: Example) -> list[Example]:
    options = {"source": "swh_Latn", "by": "lines"}
    examples, wall_s, _ = translate_examples(examples, Shouting(), **options)
    assert wall_s == 3.0
    return examples


@given(st.lists(st.tuples(TEXT, TEXT, st.integers(0, 2)), min_size=1, max_size=4))
def test_translated_pairs_stay_pairs(rows: list[tuple[str, str, int]]):
    examples, expected = [], []
    for number, (first, second, label) in enumerate(rows):
        about = {"key": str(number), "label": label}
        for part, pair in (
            (examples, (first, second)),
            (expected, (lines_said(first), lines_said(second))),
        ):
            text, cut = join(*pair)
            part.append(Example(text=text, cut=cut, **about))
    assert translated(*examples) == expected


@given(TEXT, LINE, st.lists(st.just("") | LINE, min_size=4, max_size=4), st.integers(0, 3))
def test_translated_choices_stay_choices(
    passage: str, question: str, choices: list[str], label: int
):
    example = compose("7", passage, question, choices, label)
    (other,) = translated(example)
    assert (other.key, other.label) == ("7", label)
    assert other.cut == (0, len(lines_said(passage)))
    spans = [said(f"{number} {choice}") for number, choice in enumerate(choices, start=1)]
    assert [other.text[start:end] for start, end in other.spans] == spans
    assert other.text == "\n".join([lines_said(passage) + said(f" {question}"), *spans])
    other.check(other.text)


@st.composite
def questions(draw) -> Example:
    """As XQuAD's: the passage is the span and what may be cut; answers lie in it, in any order, one
    in another too."""
    question, passage = draw(LINE), draw(TEXT)
    text, start = f"{question}\n{passage}", len(question) + 1
    edge, whole = st.integers(start, len(text)), (start, len(text))
    ranges = st.tuples(edge, edge).map(sorted).map(tuple)
    answers = draw(st.lists(ranges, min_size=1, max_size=3, unique=True))
    return Example(key="q", text=text, spans=(whole,), answers=tuple(answers), cut=whole)


@given(questions())
def test_translated_answers_stay_answers(example: Example):
    """An answer becomes what its pieces become, cut where any answer begins or ends."""
    (other,) = translated(example)
    edges = {0, len(example.text), *itertools.chain(*example.spans, *example.answers)}

    def expected(start: int, end: int) -> str:
        inside = sorted(edge for edge in edges if start <= edge <= end)
        pieces = [example.text[first:last] for first, last in zip(inside, inside[1:])]
        return "".join(map(lines_said, pieces))

    assert other.text == expected(0, len(example.text))
    for name in ("spans", "answers"):
        texts = [other.text[start:end] for start, end in getattr(other, name)]
        assert texts == [expected(*each) for each in getattr(example, name)]
    start = len(said(example.text.split("\n")[0])) + 1
    assert other.cut == other.spans[0] == (start, len(other.text))
    other.check(other.text)


def test_only_what_has_letters_is_translated():
    shouting = Shouting()
    pairs = [join("a b", "12.5"), join("  \n", "c\r\nd"), join("?!", "a b")]
    given = [
        Example(key=str(number), text=text, cut=cut) for number, (text, cut) in enumerate(pairs)
    ]
    examples, *_ = translate_examples(given, shouting, source="swh_Latn", by="lines")
    assert sorted(shouting.asked) == ["a b", "a b", "c", "d"]
    texts = ["<A B>!\n12.5", "  \n\n<C>!\r\n<D>!", "?!\n<A B>!"]
    assert [example.text for example in examples] == texts


class Marking:
    """Stands for the translator: what it was asked, in brackets, and nothing for some texts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str], *, source: str, target: str) -> Translations:
        self.asked += texts
        marked = tuple("" if text.startswith("x") else f"⟦{text}⟧" for text in texts)
        counts = {"translated": len(texts), "cached": 0, "cut": 0, "unfinished": 0, "tokens": 0}
        return Translations(texts=marked, wall_s=3.0, **counts)


WORDS = [*itertools.chain(*SENTENCES.values()), "1999!", "x y.", "12.5", "Dr. ", " ", "\n", "\r\n"]


@st.composite
def annotated(draw) -> Example:
    """Several scripts' sentences, with ranges that begin and end anywhere."""
    text = draw(st.lists(st.sampled_from([*WORDS, "  \n"]), max_size=9).map("".join))
    edge = st.integers(0, len(text))
    ranges = st.lists(st.tuples(edge, edge).map(sorted).map(tuple), max_size=3)
    options = {name: tuple(draw(ranges)) for name in ("spans", "answers")}
    cut = draw(st.none() | st.tuples(edge, edge).map(sorted).map(tuple))
    return Example(key="a", text=text, cut=cut, **options)


@given(annotated(), st.sampled_from(["eng_Latn", "jpn_Jpan"]), st.sampled_from(KINDS))
def test_split_and_joined_no_character_is_lost_and_ranges_hold_theirs(
    example: Example, target: str, by: str
):
    marking = Marking()
    options = {"source": "swh_Latn", "target": target, "by": by}
    ((other,), *_) = translate_examples([example], marking, **options)

    def bare(text: str) -> str:
        """All but brackets, and but the blanks that came between sentences."""
        text = text.replace("⟦", "").replace("⟧", "")
        return text if target == "jpn_Jpan" or by == "lines" else "".join(text.split(" "))

    ranges = [("spans", *pair) for pair in zip(example.spans, other.spans, strict=True)]
    ranges += [("answers", *pair) for pair in zip(example.answers, other.answers, strict=True)]
    ranges += [("cut", example.cut, other.cut)] if example.cut else []
    for name, before, after in [*ranges, ("text", (0, None), (0, None))]:
        assert bare(other.text[slice(*after)]) == bare(example.text[slice(*before)]), name
    # Each segment is a line or a sentence, whole, of what is between the ranges' ends.
    edges = sorted({0, len(example.text), *itertools.chain(*(each[1] for each in ranges))})
    pieces = [example.text[start:end] for start, end in itertools.pairwise(edges)]
    parts = [piece[slice(*part)] for piece in pieces for part in find_parts(piece, by)]
    assert marking.asked == [part for part in parts if any(map(str.isalpha, part))]
    assert re.findall("⟦([^⟧]*)⟧", other.text) == [
        part for part in marking.asked if not part.startswith("x")
    ]


@pytest.mark.parametrize(
    ("target", "text", "expected"),
    [
        ("eng_Latn", "他来了。她走了！1999。", "⟦他来了。⟧ ⟦她走了！⟧ 1999。"),
        ("zho_Hans", "他来了。她走了！", "⟦他来了。⟧⟦她走了！⟧"),
        ("eng_Latn", "Ba ba!  Dr. Lee a.\n\tBa?", "⟦Ba ba!⟧  ⟦Dr. Lee a.⟧\n\t⟦Ba?⟧"),
        ("eng_Latn", "བོད་ཡོད།མི་ཡོད།", "⟦བོད་ཡོད།⟧ ⟦མི་ཡོད།⟧"),
        ("eng_Latn", "1999。2000。", "1999。2000。"),
    ],
)
def test_sentences_are_joined_as_the_target_language_has_it(target, text, expected):
    example = Example(key="a", text=text)
    ((other,), *_) = translate_examples([example], Marking(), source="zho_Hans", target=target)
    assert other.text == expected


def test_a_long_passage_is_translated_sentence_by_sentence(checkpoint, tmp_path):
    """Not cut at the positions, as it is in one; in the same cache, by segments."""
    passage = " ".join(["Two words. A text!"] * 30)
    translator = Translator(checkpoint, cache=tmp_path, world=build_world())
    examples = [Example(key="a", text=passage), Example(key="b", text="A text!")]
    whole = translate_examples(examples, translator, source=SOURCE, by="lines")
    assert (whole.counts["segments"], whole.counts["cut"], whole.counts["cut_segments"]) == (
        2,
        1,
        1,
    )
    split = translate_examples(examples, translator, source=SOURCE)
    assert (split.counts["segments"], split.counts["cut"], split.counts["cut_segments"]) == (
        61,
        0,
        0,
    )
    # Seconds: of each segment once, whoever translated it.
    segments = translator(["Two words.", "A text!"], source=SOURCE)
    assert (segments.cached, segments.wall_s) == (2, split.wall_s)
    expected = " ".join([" ".join(segments.texts)] * 30)
    assert [each.text for each in split.examples] == [expected, segments.texts[1]]
    assert len(list(tmp_path.iterdir())) == 1
