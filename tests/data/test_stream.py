import itertools
import json
import threading
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_engine.config import DataConfig
from mtllm_engine.data.batch import NO_SPANS
from mtllm_engine.data.shards import BadDocumentError, Manifest, import_shards
from mtllm_engine.data.stream import agree, build_stream, each_step
from mtllm_engine.data.tars import DamagedShardError
from mtllm_engine.data.tokenizers import Reading
from mtllm_engine.languages import ENGLISH, check_language
from mtllm_engine.tasks import Example, pack
from tests.support.tiny import build_world, pack_lines

LONGEST = 16


class Tokenizer:
    """Gives a text, which is a number, 1 to LONGEST tokens equal to it, or raises its fault."""

    def __init__(self, faults=None):
        self.faults = faults or {}

    def student(self, language):
        return check_language(language)

    def __call__(self, text, language):
        if text in self.faults:
            raise self.faults[text]
        lengths = Random(text).choices(range(1, LONGEST + 1), k=2)
        return tuple(np.full(length, int(text), np.int32) for length in lengths)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Corpora by size: documents that are the numbers from `first` on."""

    @cache
    def build(count, num_shards, first=0):
        lines = [str(number) for number in range(first, first + count)]
        return pack_lines(
            tmp_path_factory.mktemp("corpus") / "corpus", lines, num_shards=num_shards
        )

    return build


def open_stream(
    folders, rank=0, size=1, *, seed=0, once=False, tokenizer=None, labelled=False, **options
):
    """A stream of one rank; `folders` are one or several corpora, or one that is read once."""
    folders = folders if isinstance(folders, list) else [folders]
    train = () if once else tuple(map(str, folders))
    config = DataConfig(
        train=train, **{"lanes": 4, "pack_documents": 3, "max_length": LONGEST} | options
    )
    more = {"seed": seed, "corpus": folders[0] if once else None, "labelled": labelled}
    return closing(build_stream(config, tokenizer or Tokenizer(), build_world(rank, size), **more))


def open_ranks(stack, folders, size, states=None, **options):
    """The streams of all ranks of a world, continued from all lanes' `states` if there are any."""
    streams = [
        stack.enter_context(open_stream(folders, rank, size, **options)) for rank in range(size)
    ]
    for stream in streams if states else []:
        stream.load_state(states)
    return streams


def next_step(streams):
    """What all ranks consume in a step: each lane's pack, in the order of lanes."""
    by_rank = [stream.next_step() for stream in streams]
    return [pack for packs in itertools.zip_longest(*by_rank) for pack in packs if pack is not None]


def numbers(packs):
    """The documents of each pack, by the numbers that they are."""
    return [[int(document.student_ids_S[0]) for document in pack.documents] for pack in packs]


def saved_states(streams):
    """All lanes' states, as a checkpoint holds them."""
    states = json.loads(
        json.dumps({lane: state for stream in streams for lane, state in stream.state().items()})
    )
    return {int(lane): state for lane, state in states.items()}


def read_steps(folders, size, num_steps, states=None, **options):
    """Documents by step and lane, and the states after the last step."""
    with ExitStack() as stack:
        streams = open_ranks(stack, folders, size, states, **options)
        return [numbers(next_step(streams)) for _ in range(num_steps)], saved_states(streams)


def read_all(folders, size=1, **options):
    """The documents of a finite stream by step and pack, and how many were skipped."""
    with ExitStack() as stack:
        streams = open_ranks(stack, folders, size, once=True, **options)
        steps = list(iter(lambda: numbers(next_step(streams)), []))
        return steps, sum(stream.skipped for stream in streams)


def flat(nested):
    return list(itertools.chain.from_iterable(nested))


def documents_by_lane(steps):
    return [flat(packs) for packs in zip(*steps, strict=True)]


LANES = st.integers(1, 7)
PACKS = st.builds(lambda k: {"pack_documents": k}, st.integers(1, 4)) | st.builds(
    lambda budget: {"pack_documents": 0, "pack_tokens": budget}, st.integers(LONGEST, 4 * LONGEST)
)
SIZES = st.sampled_from([(7, 1), (7, 7), (20, 3), (31, 5), (64, 8)])
SEEDS = st.integers(0, 2**63 - 1)
MIXED = st.booleans()


def mixture(corpus, sizes, mixed):
    return [corpus(*sizes), *([corpus(11, 2, first=1000)] if mixed else [])]


@settings(max_examples=20)
@given(sizes=SIZES, mixed=MIXED, packs=PACKS, lanes=LANES, seed=SEEDS, data=st.data())
def test_a_step_is_the_same_on_any_number_of_ranks(corpus, sizes, mixed, packs, lanes, seed, data):
    options = {"lanes": lanes, "seed": seed, **packs}
    folders = mixture(corpus, sizes, mixed)
    expected = read_steps(folders, 1, 6, **options)
    for size in {2, 3, 5, lanes} & set(range(1, lanes + 1)):
        assert (
            read_steps(folders, size, 6, **options, prefetch=data.draw(st.integers(1, 9)))
            == expected
        )
    assert all(len(step) == lanes for step in expected[0])


@given(max_tokens=st.integers(3 * LONGEST, 12 * LONGEST), seed=SEEDS)
def test_a_step_is_the_same_in_any_micro_batches(corpus, max_tokens, seed):
    """`agree`, which training calls, keeps documents in order, however packs are joined."""
    with (
        open_stream(corpus(31, 5), seed=seed) as stream,
        open_stream(corpus(31, 5), seed=seed) as same,
    ):
        for _ in range(4):
            global_batch = agree(stream, build_world(), max_tokens)
            documents = flat(pack.documents for pack in same.next_step())
            assert [document.key for document in flat(global_batch.micro_batches)] == [
                document.key for document in documents
            ]
            assert global_batch.totals.spans == 12 and not global_batch.stop


@given(sizes=SIZES, lanes=LANES, seed=SEEDS, packs=PACKS)
def test_lanes_partition_every_epoch(corpus, sizes, lanes, seed, packs):
    """Each document once per epoch, in lanes that differ by one at most, in any shards."""
    count = sizes[0]
    steps, _ = read_steps(
        corpus(*sizes), 1, 3 * count // lanes + 3, lanes=lanes, seed=seed, **packs
    )
    by_lane = documents_by_lane(steps)
    lane_sizes = [(lane + 1) * count // lanes - lane * count // lanes for lane in range(lanes)]
    assert max(lane_sizes) - min(lane_sizes) <= 1
    for epoch in range(2):
        parts = [
            part[epoch * size : (epoch + 1) * size]
            for part, size in zip(by_lane, lane_sizes, strict=True)
        ]
        assert sorted(flat(parts)) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own(corpus):
    options = {"lanes": 1, "pack_documents": 64}
    epochs = [step[0] for step in read_steps(corpus(64, 8), 1, 3, **options)[0]]
    other_seed = read_steps(corpus(64, 8), 1, 1, seed=1, **options)[0][0][0]
    orders = [*epochs, other_seed, list(range(64))]
    assert len({tuple(order) for order in orders}) == 5 and all(
        sorted(order) == list(range(64)) for order in orders
    )


def test_an_epoch_goes_through_one_shard_after_another(corpus):
    folder = corpus(64, 8)
    shards = flat(
        [number] * shard.samples for number, shard in enumerate(Manifest.load(folder).shards)
    )
    by_lane = documents_by_lane(read_steps(folder, 1, 4, lanes=4, pack_documents=4)[0])
    visits = [shard for shard, _ in itertools.groupby(shards[number] for number in flat(by_lane))]
    assert sorted(visits) == list(range(8)) and visits != sorted(visits)


def test_order_stays_as_it_is(corpus):
    """Or runs could not be continued by newer versions."""
    steps, _ = read_steps(corpus(20, 3), 1, 2, lanes=2, seed=5)
    assert steps == [[[3, 6, 1], [15, 16, 18]], [[7, 2, 4], [17, 9, 12]]]


@given(sizes=SIZES, mixed=MIXED, lanes=LANES, seed=SEEDS, k=st.integers(1, 9))
def test_packs_of_k_documents(corpus, sizes, mixed, lanes, seed, k):
    """Always k, also across the border of an epoch."""
    steps, _ = read_steps(
        mixture(corpus, sizes, mixed), 1, 8, lanes=lanes, seed=seed, pack_documents=k
    )
    assert {len(pack) for pack in flat(steps)} == {k}


@given(sizes=SIZES, mixed=MIXED, lanes=LANES, seed=SEEDS, budget=st.integers(LONGEST, 5 * LONGEST))
def test_token_packs_are_full(corpus, sizes, mixed, lanes, seed, budget):
    """Whole documents within the budget on both sides; the next one would not have fitted."""
    folders, options = mixture(corpus, sizes, mixed), {"pack_documents": 0, "pack_tokens": budget}
    with open_stream(folders, lanes=lanes, seed=seed, **options) as stream:
        by_lane = list(zip(*(stream.next_step() for _ in range(8)), strict=True))
    for packs in by_lane:
        sizes_2 = [
            np.array([token_counts(document) for document in pack.documents]) for pack in packs
        ]
        for size_2, next_2 in itertools.pairwise(sizes_2):
            assert (size_2.sum(0) <= budget).all()
            assert (size_2.sum(0) + next_2[0] > budget).any()


def token_counts(document):
    """Student and teacher tokens; fails if the document is not whole."""
    whole = Tokenizer()(str(document.student_ids_S[0]), ENGLISH)
    for ours, expected in zip((document.student_ids_S, document.teacher_ids_T), whole, strict=True):
        np.testing.assert_array_equal(ours, expected)
    return len(document.student_ids_S), len(document.teacher_ids_T)


@given(sizes=SIZES, lanes=LANES, seed=SEEDS, data=st.data())
def test_packing_changes_no_lanes_documents(corpus, sizes, lanes, seed, data):
    """Packs only cut a lane's sequence."""
    steps, _ = read_steps(corpus(*sizes), 1, 12, lanes=lanes, seed=seed, pack_documents=1)
    other, _ = read_steps(corpus(*sizes), 1, 3, lanes=lanes, seed=seed, **data.draw(PACKS))
    for ones, packed in zip(documents_by_lane(steps), documents_by_lane(other), strict=True):
        common = min(len(ones), len(packed))
        assert ones[:common] == packed[:common]


@given(sizes=SIZES, mixed=MIXED, packs=PACKS, lanes=LANES, seed=SEEDS, data=st.data())
def test_stopped_anywhere_and_continued_on_any_world(
    corpus, sizes, mixed, packs, lanes, seed, data
):
    """Read-ahead does not leak into the state: what was not consumed comes again."""
    folders, options = mixture(corpus, sizes, mixed), {"lanes": lanes, "seed": seed, **packs}
    before, after = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 4))
    whole, final = read_steps(folders, 1, before + after, **options)
    worlds = st.tuples(st.integers(1, lanes), st.integers(1, 4))
    (size, prefetch), (new_size, new_prefetch) = data.draw(st.tuples(worlds, worlds))
    first, states = read_steps(folders, size, before, **options, prefetch=prefetch)
    rest = read_steps(folders, new_size, after, states, **options, prefetch=new_prefetch)
    assert (first + rest[0], rest[1]) == (whole, final)


def test_closed_stream_goes_on_where_it_was_consumed(corpus):
    expected, _ = read_steps(corpus(31, 5), 1, 4)
    with open_stream(corpus(31, 5), prefetch=3) as stream:
        steps = []
        for _ in range(4):
            steps.append(numbers(stream.next_step()))
            stream.close()
    assert steps == expected


@pytest.mark.parametrize(
    ("weights", "share"), [((3.0, 1.0), 0.75), ((1.0, 9.0), 0.1), ((), 20 / 31)]
)
def test_mixture_follows_the_weights(corpus, weights, share):
    """Without weights, the numbers of documents; 2000 draws are within four standard deviations."""
    folders = [corpus(20, 3), corpus(11, 2, first=1000)]
    steps, _ = read_steps(folders, 1, 125, lanes=4, pack_documents=4, mixture=weights)
    drawn = [tuple(number < 1000 for number in numbers) for numbers in documents_by_lane(steps)]
    assert abs(sum(flat(drawn)) / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5
    assert len(set(drawn)) == 4


def test_corpora_of_a_mixture_have_epochs_of_their_own(corpus):
    """A lane goes through its part of each corpus as it does without the other."""
    folders = [corpus(20, 3), corpus(11, 2, first=1000)]
    mixed = documents_by_lane(read_steps(folders, 1, 30)[0])
    for folder, is_first in ((folders[0], True), (folders[1], False)):
        alone = documents_by_lane(read_steps(folder, 1, 30)[0])
        for lane_mixed, lane_alone in zip(mixed, alone, strict=True):
            part = [number for number in lane_mixed if (number < 1000) == is_first]
            assert part and part == lane_alone[: len(part)]


@given(sizes=SIZES, packs=PACKS, lanes=st.integers(1, 12), seed=SEEDS, data=st.data())
def test_finite_stream_holds_every_document_once(corpus, sizes, packs, lanes, seed, data):
    """More lanes than documents too: those without any just end."""
    size = data.draw(st.integers(1, min(lanes, 5)))
    steps, skipped = read_all(corpus(*sizes), size, lanes=lanes, seed=seed, **packs)
    assert sorted(flat(flat(steps))) == list(range(sizes[0])) and skipped == 0


@given(sizes=SIZES, lanes=st.integers(1, 12), seed=SEEDS)
def test_each_step_of_a_finite_stream_comes_once_and_then_it_is_closed(corpus, sizes, lanes, seed):
    before = threading.active_count()
    with open_stream(corpus(*sizes), once=True, lanes=lanes, seed=seed) as stream:
        steps = list(each_step(stream, build_world(), max_tokens=3 * LONGEST))
        assert threading.active_count() == before
    documents = [document for step in steps for part in step.micro_batches for document in part]
    assert sorted(int(document.student_ids_S[0]) for document in documents) == list(range(sizes[0]))
    assert sum(step.totals.documents for step in steps) == sizes[0]


def test_ended_stream_stays_ended(corpus):
    with open_stream(corpus(7, 1), once=True) as stream:
        while stream.next_step():
            pass
        assert stream.next_step() == stream.next_step() == []


def damaged(folder):
    """A corpus of five documents in two shards, the second one cut: (folder, sound documents)."""
    pack_lines(folder, ["0", "1", "2", "3", "4"], num_shards=2)
    shard = folder / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    return folder, [0, 1, 2]


def spoilt(folder):
    """A corpus of five documents, of which one is empty and one is not UTF-8."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar")) as tar:
        for key, raw in enumerate([b"0", b" \n", b"2", b"\xff", b"4"]):
            tar.write({"__key__": str(key), "txt": raw})
    import_shards(folder, language=ENGLISH, progress=False)
    return folder, [0, 2, 4]


BAD = [
    (damaged, DamagedShardError, r"000001\.tar is cut"),
    (spoilt, BadDocumentError, r"key [13]: (empty|not UTF-8)"),
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_documents_are_skipped_and_counted(tmp_path, build, error, message, size):
    folder, sound = build(tmp_path / "corpus")
    steps, skipped = read_all(folder, size, lanes=2, pack_documents=2, on_error="skip")
    assert sorted(flat(flat(steps))) == sound and skipped == 2


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_documents_raise(tmp_path, build, error, message):
    folder, _ = build(tmp_path / "corpus")
    with pytest.raises(error, match=message):
        read_all(folder, lanes=2)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_document_without_a_label_is_a_bad_one_where_labels_are_learned(tmp_path, size):
    labels = {number: -1 if number in (2, 5) else 0 for number in range(8)}
    examples = [
        Example(key=str(number), text=str(number), label=label) for number, label in labels.items()
    ]
    pack(examples, tmp_path / "corpus", language=ENGLISH, licence="")
    assert len(flat(flat(read_all(tmp_path / "corpus", size)[0]))) == 8
    options = {"lanes": 3, "pack_documents": 2, "labelled": True}
    with pytest.raises(
        BadDocumentError,
        match=r'\.tar, key [25]: it has no label to learn; .* data.on_error="skip"',
    ):
        read_all(tmp_path / "corpus", size, **options)
    steps, skipped = read_all(tmp_path / "corpus", size, on_error="skip", **options)
    assert sorted(flat(flat(steps))) == [0, 1, 3, 4, 6, 7] and skipped == 2


def test_skips_survive_a_stop(tmp_path):
    folder, sound = spoilt(tmp_path / "corpus")
    options = {"lanes": 2, "on_error": "skip", "pack_documents": 2}
    whole, final = read_steps(folder, 1, 5, **options)
    first, states = read_steps(folder, 2, 2, **options)
    assert read_steps(folder, 1, 3, states, **options) == (whole[2:], final)
    assert sum(state["skipped"] for state in final.values()) > 4
    assert set(flat(flat(whole))) == set(sound)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_document_that_no_limit_allows_is_a_bad_one(corpus, on_error):
    tokenizer = Tokenizer({"3": ValueError("its first character is too long")})
    options = {"tokenizer": tokenizer, "on_error": on_error}
    if on_error == "skip":
        steps, skipped = read_all(corpus(7, 1), **options)
        assert sorted(flat(flat(steps))) == [0, 1, 2, 4, 5, 6] and skipped == 1
    else:
        with pytest.raises(
            BadDocumentError, match=r"000000\.tar, key 0000000003: its first character is too long"
        ):
            read_all(corpus(7, 1), **options)


def test_lane_without_any_usable_document_is_an_error(corpus):
    tokenizer = Tokenizer({str(number): BadDocumentError("bad") for number in range(7)})
    with (
        open_stream(corpus(7, 1), tokenizer=tokenizer, on_error="skip") as stream,
        pytest.raises(ValueError, match="lane 0 has no usable document"),
    ):
        stream.next_step()


def test_error_in_the_reader_reaches_the_caller_at_its_step_and_again(corpus):
    """The steps before it come first, whatever had been read ahead."""
    expected, _ = read_steps(corpus(31, 5), 1, 8, lanes=1)
    culprit = expected[5][0][1]
    tokenizer = Tokenizer({str(culprit): RuntimeError("not even a ValueError")})
    with open_stream(corpus(31, 5), tokenizer=tokenizer, lanes=1, prefetch=2) as stream:
        assert [numbers(stream.next_step()) for _ in range(5)] == expected[:5]
        for _ in range(3):
            with pytest.raises(RuntimeError, match="not even"):
                stream.next_step()


@pytest.mark.parametrize("faults", [{}, {"3": RuntimeError("bad")}])
@pytest.mark.parametrize("once", [False, True])
def test_close_ends_the_thread(corpus, faults, once):
    before = threading.active_count()
    options = {"tokenizer": Tokenizer(faults), "once": once, "prefetch": 1}
    with open_stream(corpus(7, 1), **options) as stream:
        with pytest.raises(RuntimeError) if faults else ExitStack():
            stream.next_step()
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    stream.close()  # once more does no harm


def test_closing_a_stream_that_was_never_read(corpus):
    before = threading.active_count()
    with open_stream(corpus(7, 1)):
        assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 8}, "corpus has 7 documents, fewer than data.lanes=8"),
        ({"lanes": 4, "size": 5}, "5 ranks need at least as many data.lanes; there are 4"),
    ],
)
def test_too_many_lanes_or_ranks(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        open_stream(corpus(7, 1), **options)


def test_unknown_language_of_a_corpus_is_an_error(tmp_path, corpus):
    replace(Manifest.load(corpus(7, 1)), language="en_Latn").save(tmp_path)
    with pytest.raises(ValueError, match="unknown language 'en_Latn'; did you mean eng_Latn"):
        open_stream(tmp_path)


@settings(max_examples=10)
@given(seed=SEEDS)
def test_names_for_dropout_differ_and_do_not_depend_on_the_world(corpus, seed):
    folders = [corpus(20, 3), corpus(11, 2, first=1000)]
    names = []
    for size in (1, 3):
        with ExitStack() as stack:
            streams = open_ranks(stack, folders, size, seed=seed)
            packs = flat(next_step(streams) for _ in range(6))
            documents = flat(pack.documents for pack in packs)
            names.append({int(document.student_ids_S[0]): document.seed for document in documents})
    assert names[0] == names[1] and len(set(names[0].values())) == len(names[0])
    assert all(0 <= name < 2**32 for name in names[0].values())


class ExampleTokenizer(Tokenizer):
    """Reads a character as a token, behind one that belongs to none."""

    def example(self, text, language, annotations):
        spans_P2 = np.array(annotations.spans, np.int32) + 1
        answers_A2 = np.array(annotations.answers, np.int32).reshape(-1, 2) + 1
        reading = Reading(
            ids_S=np.zeros(len(text) + 1, np.int32),
            offsets_S2=NO_SPANS,
            spans_P2=spans_P2,
            answers_A2=answers_A2,
        )
        return reading, reading


def test_examples_carry_their_annotations_and_spans_are_counted(tmp_path):
    examples = [
        Example(
            key=str(number),
            text=f"{number:04d} choices",
            label=number,
            spans=((0, 2), (5, 12)),
            answers=((1, 3),),
        )
        for number in range(6)
    ]
    examples += [
        Example(key=str(number), text=str(number), label=number) for number in range(6, 10)
    ]
    pack(examples, tmp_path / "corpus", language=ENGLISH, licence="")
    with open_stream(
        tmp_path / "corpus", once=True, pack_documents=10, lanes=1, tokenizer=ExampleTokenizer()
    ) as stream:
        step = agree(stream, build_world(), max_tokens=1000)
    (documents,) = step.micro_batches
    assert (step.totals.documents, step.totals.spans) == (10, 6 * 2 + 4)
    by_key = {document.key: document for document in documents}
    assert {key: document.label for key, document in by_key.items()} == {
        str(number): number for number in range(10)
    }
    of_3, of_8 = by_key["3"], by_key["8"]
    assert of_3.student_spans_P2.tolist() == of_3.teacher_spans_P2.tolist() == [[1, 3], [6, 13]]
    assert of_3.student_answers_A2.tolist() == of_3.teacher_answers_A2.tolist() == [[2, 4]]
    assert of_8.teacher_spans_P2.tolist() == [[0, len(of_8.teacher_ids_T)]]
    assert not len(of_8.student_answers_A2)


class PairReader(Tokenizer):
    """A token for each line."""

    def __call__(self, text, language):
        numbers = np.array([int(line) for line in text.split("\n")], np.int32)
        return numbers, numbers


def read_pairs(folders, num_steps, size=1, seed=0, **options):
    """The lines of each document, by step."""
    with ExitStack() as stack:
        options |= {"seed": seed, "tokenizer": PairReader()}
        streams = open_ranks(stack, folders, size, **options)
        return [
            [
                tuple(document.student_ids_S)
                for pack in next_step(streams)
                for document in pack.documents
            ]
            for _ in range(num_steps)
        ]


@settings(max_examples=6, deadline=None)
@given(
    count=st.integers(60, 90),
    pairs=st.sampled_from([0.0, 0.4, 1.0]),
    size=st.integers(2, 4),
    seed=st.integers(0, 9),
)
def test_a_share_of_the_documents_becomes_pairs(corpus, count, pairs, size, seed):
    """With documents of the same shard, the same on any number of ranks, others in every epoch."""
    folder, steps = corpus(count, 3), 3 * count // 12
    read = read_pairs(folder, steps, pairs=pairs, seed=seed)
    assert read == read_pairs(folder, steps, size, pairs=pairs, seed=seed)
    plain = read_pairs(folder, steps, seed=seed)
    documents, unpaired = (list(itertools.chain(*each)) for each in (read, plain))
    assert [document[:1] for document in documents] == unpaired  # each begins with its own
    found = [document for document in documents if len(document) == 2]
    sizes = np.cumsum([0, *(shard.samples for shard in Manifest.load(folder).shards)])
    shards = [np.searchsorted(sizes, document, side="right") for document in found]
    assert all(first == second for first, second in shards)
    assert len(found) == pytest.approx(pairs * len(documents), abs=0.15 * len(documents))
    assert len(set(found)) >= 0.7 * len(found)  # of three epochs


def test_of_sentences_one_each_is_paired(tmp_path):
    lines = [f"{n}1. {n}2.  {n}3!" for n in range(10, 40)]
    folder = pack_lines(tmp_path / "sentences", lines, num_shards=1)

    class Sentences(PairReader):
        def __call__(self, text, language):
            return super().__call__(text.replace(".", "").replace("!", "").strip(), language)

    with ExitStack() as stack:
        (stream,) = open_ranks(stack, folder, 1, tokenizer=Sentences(), pairs=1.0)
        found = [
            tuple(d.student_ids_S)
            for _ in range(9)
            for p in next_step([stream])
            for d in p.documents
        ]
    assert all(len(pair) == 2 for pair in found)
    assert {number % 10 for pair in found for number in pair} == {1, 2, 3}


def test_what_is_measured_or_labelled_is_never_paired(corpus, tmp_path):
    with ExitStack() as stack:
        options = {"once": True, "tokenizer": PairReader(), "pairs": 1.0}
        (stream,) = open_ranks(stack, corpus(30, 3), 1, **options)
        read = [d for p in next_step([stream]) for d in p.documents]
    assert read and all(len(document.student_ids_S) == 1 for document in read)
    examples = [Example(key=str(n), text=str(n), label=n % 3) for n in range(30)]
    pack(examples, tmp_path / "task", language=ENGLISH, licence="CC0-1.0")
    read = read_pairs([tmp_path / "task", corpus(30, 3, 100)], 8, pairs=1.0)
    documents = list(itertools.chain(*read))
    assert {len(document) for document in documents if document[0] < 100} == {1}
    assert {len(document) for document in documents if document[0] >= 100} == {2}
