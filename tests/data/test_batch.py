import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mtllm_engine.data.batch import Document, Pack, collate, join

CPU = torch.device("cpu")
SEED = st.integers(0, 2**32 - 1)
LENGTHS = st.tuples(st.integers(1, 9), st.integers(1, 9))  # student and teacher tokens


@st.composite
def documents(draw, max_size=8):
    """Documents of any lengths; each has a name of its own and ids that tell it from the others."""
    sizes = draw(st.lists(LENGTHS, max_size=max_size))
    names = draw(st.lists(SEED, min_size=len(sizes), max_size=len(sizes), unique=True))
    ids = draw(st.lists(st.integers(0, 2**31 - 99), min_size=len(sizes), max_size=len(sizes)))
    return [
        Document(
            key=str(name),
            seed=name,
            student_ids_S=tokens(first, S),
            teacher_ids_T=tokens(first + 50, T),
        )
        for name, first, (S, T) in zip(names, ids, sizes, strict=True)
    ]


def tokens(first, count):
    return np.arange(first, first + count, dtype=np.int32)


@st.composite
def packs(draw):
    """Consecutive packs, some without documents."""
    pool = draw(documents(max_size=16))
    cuts = sorted(draw(st.lists(st.integers(0, len(pool)), max_size=6)))
    return [
        Pack(documents=tuple(pool[start:end]), state={})
        for start, end in itertools.pairwise([0, *cuts, len(pool)])
    ]


def num_tokens(documents):
    return (
        sum(len(item.student_ids_S) for item in documents),
        sum(len(item.teacher_ids_T) for item in documents),
    )


def keys(documents):
    return [document.key for document in documents]


@given(packs=packs(), spare=st.integers(0, 40))
def test_micro_batches_hold_consecutive_packs_and_no_more_than_fits(packs, spare):
    limit = max(1, *(max(num_tokens(pack.documents)) for pack in packs)) + spare
    micro_batches = join(packs, limit)
    remaining = [pack.documents for pack in packs if pack.documents]
    for documents in micro_batches:
        taken = []
        while len(taken) < len(documents):
            taken += remaining.pop(0)
        assert keys(taken) == keys(documents) != []
        assert max(num_tokens(documents)) <= limit
        assert not remaining or max(num_tokens([*documents, *remaining[0]])) > limit
    assert not remaining


@given(documents=documents(), step_seed=SEED)
def test_collated_tokens_are_the_documents_one_after_another(documents, step_seed):
    assume(documents)
    batch = collate(documents, step_seed=step_seed, device=CPU)
    assert batch.keys == tuple(keys(documents))
    assert batch.weight_P.tolist() == len(documents) * [1.0]
    for packed, side in ((batch.student, "student_ids_S"), (batch.teacher, "teacher_ids_T")):
        ids = [getattr(document, side).tolist() for document in documents]
        assert packed.ids_S.tolist() == sum(ids, [])
        assert packed.positions_S.tolist() == [
            position for item in ids for position in range(len(item))
        ]
        assert packed.cu_seqlens.tolist() == [0, *itertools.accumulate(map(len, ids))]
        assert packed.lengths == tuple(map(len, ids)) and packed.max_seqlen == max(map(len, ids))
        assert packed.ids_S.dtype == packed.positions_S.dtype == torch.int64
        assert packed.cu_seqlens.dtype == packed.seeds_S.dtype == torch.int32


@pytest.mark.parametrize("documents", [[], ()])
def test_idle_micro_batch_is_one_token_of_no_weight(documents):
    batch = collate(documents, step_seed=2**32 - 1, device=CPU)
    for packed in (batch.student, batch.teacher):
        assert packed.lengths == (1,) and packed.cu_seqlens.tolist() == [0, 1]
        assert len(packed.ids_S) == len(packed.positions_S) == len(packed.seeds_S) == 1
    assert batch.weight_P.tolist() == [0.0] and batch.keys == ()


def seeds_by_document(documents, step_seed):
    """Document key -> its tokens' numbers for dropout, of both sides."""
    batch = collate(documents, step_seed=step_seed, device=CPU)
    parts = [packed.seeds_S.split(packed.lengths) for packed in (batch.student, batch.teacher)]
    return {
        key: (student.tolist(), teacher.tolist())
        for key, student, teacher in zip(batch.keys, *parts, strict=True)
    }


@given(documents=documents(), step_seed=SEED, data=st.data())
def test_dropout_seeds_do_not_depend_on_the_micro_batch(documents, step_seed, data):
    assume(documents)
    expected = seeds_by_document(documents, step_seed)
    others = data.draw(st.permutations(documents))
    cut = data.draw(st.integers(1, len(others)))
    seeds = seeds_by_document(others[:cut], step_seed)
    seeds |= seeds_by_document(others[cut:], step_seed) if others[cut:] else {}
    assert seeds == expected


@given(
    names=st.lists(SEED, min_size=2, max_size=2, unique=True),
    steps=st.lists(SEED, min_size=2, max_size=2, unique=True),
)
@example(names=[0, 1], steps=[0, 1])
@example(names=[2**32 - 1, 0], steps=[1, 2**31])
def test_dropout_seeds_tell_documents_tokens_and_steps_apart(names, steps):
    """No two tokens of a document have one number; others' numbers meet by chance alone."""
    pair = [
        Document(key=str(name), seed=name, student_ids_S=tokens(0, 512), teacher_ids_T=tokens(0, 1))
        for name in names
    ]
    (first, _), (second, _) = seeds_by_document(pair, steps[0]).values()
    (later, _), _ = seeds_by_document(pair, steps[1]).values()
    assert len(set(first)) == len(set(second)) == 512
    assert len({*first, *second}) >= 1023 and len({*first, *later}) >= 1023


def test_dropout_seeds_are_even_in_every_bit():
    """In 2^15 numbers each bit is set within five standard deviations of half the time."""
    many = [
        Document(key=str(n), seed=n, student_ids_S=tokens(0, 512), teacher_ids_T=tokens(0, 1))
        for n in range(64)
    ]
    seeds = collate(many, step_seed=7, device=CPU).student.seeds_S.numpy().view(np.uint32)
    shares = ((seeds[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(axis=0)
    assert np.abs(shares - 0.5).max() < 5 * 0.5 / len(seeds) ** 0.5


@st.composite
def spanned(draw, length):
    """Spans of a document: in order, disjoint, none empty; any number of them, at least one."""
    edges = sorted(draw(st.lists(st.integers(0, length), min_size=2, max_size=8, unique=True)))
    gaps = draw(st.booleans())
    pairs = list(zip(edges[::2], edges[1::2])) if gaps else list(itertools.pairwise(edges))
    return np.array(pairs, np.int32)


@given(documents=documents(), data=st.data())
def test_spans_are_pooled_where_they_lie_in_the_pack(documents, data):
    """Span p of a document has a weight of its own on both sides; without any, the whole has."""
    assume(documents)
    expected, spanning = ([], []), []
    for number, document in enumerate(documents):
        lengths = (len(document.student_ids_S), len(document.teacher_ids_T))
        spans = [data.draw(spanned(length)) for length in lengths] if number % 2 else [None, None]
        count = min(map(len, spans)) if number % 2 else 1
        spans = [
            spans_P2[:count] if number % 2 else np.array([[0, length]])
            for spans_P2, length in zip(spans, lengths)
        ]
        names = {"student_spans_P2": spans[0], "teacher_spans_P2": spans[1]} if number % 2 else {}
        spanning.append(
            dataclasses.replace(document, label=number, **names) if number % 2 else document
        )
        for side in range(2):
            start = num_tokens(documents[:number])[side]
            expected[side].extend((spans[side] + start).tolist())
    batch = collate(spanning, step_seed=0, device=CPU)
    assert batch.student_spans.bounds_P2.tolist() == expected[0]
    assert batch.teacher_spans.bounds_P2.tolist() == expected[1]
    assert batch.weight_P.tolist() == [1.0] * len(expected[0])
    counts = [len(document.student_spans_P2) for document in spanning]
    indices = [(number, index) for number, count in enumerate(counts) for index in range(count)]
    assert list(zip(batch.document_P.tolist(), batch.index_P.tolist())) == indices
    assert batch.labels_N.tolist() == [
        number if number % 2 else -1 for number in range(len(documents))
    ]
    assert batch.labels_N.dtype == torch.int64


def test_idle_micro_batch_has_no_label():
    batch = collate([], step_seed=0, device=CPU)
    assert batch.labels_N.tolist() == [-1]
    assert batch.weight_N.tolist() == [0.0] and batch.index_P.tolist() == [0]
