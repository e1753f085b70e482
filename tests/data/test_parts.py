"""Texts in parts: where they are cut, and that both sides read the same characters and newlines."""

import itertools
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers
from transformers import AutoTokenizer

from mtllm_engine.data.annotations import NO_ANNOTATIONS, Annotations, partners
from mtllm_engine.data.batch import IDLE, ONE_PART, Document, collate
from mtllm_engine.data.parts import PartsTokenizer, find_parts
from mtllm_engine.data.tokenizers import PairTokenizer
from tests.support.scripts import SENTENCES
from tests.support.tiny import build_decoder, build_encoder

SWAHILI, CPU = "swh_Latn", torch.device("cpu")
KINDS = ("lines", "sentences")
NEWLINES = "\n\v\f\r\x85\u2028\u2029"

MARKED = [  # a bar between two sentences
    "It was read on July 6. A copy, of 3.5 pages, came at 10.",  # an ordinal, and a number
    "Dr. Lee of the U.S. Army met J. F. Roe vs. Wade et al. in no. five. |They agreed! |Why?",
    'He asked: "Why? |Who said so?" |"I did." she said ... and left… |Then nothing.',
    "See www.a.org, v1.2.3 and a.b! for more (p. 4). |(Or not.) |¿Qué? |«Nada.» |Ça va.",
    "Они живут в г. Киеве. |Их мало! но они есть. |И т. д.",
    "Am 3. Oktober kam er z. B. nach Köln. |Dann ging er.",
    "Τι είναι αυτό; |Είναι η ερώτηση· όχι η απάντηση. |Ναι;",
    "Սա նախադասություն է: |Իսկ սա՝ ոչ. այդպես է։ |Վերջ:",
    "哲学。|科学！|真的？|「对。」|完了",
    "ཁྱིམ་དང་། ཤིང་དང་། མི་ཡོད། |ཁོ་ཚོར་གསང་གྲངས་ཡོད།",
    "ปี พ.ศ. 2537 เวลา 11.00 น. ตามเวลา",
    "မြို့၊ ရွာ။ |နောက်တစ်ခု။",
    "तुम कौन हो? |मैं हूँ॥ |हाँ।",
    "هل هذا؟ |نعم.",
    "the cat sleeps. |the others eat fish, meat etc. and milk.",
    "no end, here.neither",
    '"... !? ..." । । ',
]
MARKED += [" |".join(pair) for pair in SENTENCES.values()]


@pytest.mark.parametrize("marked", MARKED)
def test_sentences_end_where_a_reader_would_say(marked):
    text = marked.replace("|", "")
    expected = [part.strip() for part in marked.split("|")]
    assert [text[slice(*part)] for part in find_parts(text, "sentences")] == expected
    assert [text[slice(*part)] for part in find_parts(text, "lines")] == [text.strip()]


MARKS = [*'.!?。།"(’', "Mr.", "3.", " ", *NEWLINES]
BITS = [*itertools.chain(*SENTENCES.values()), *MARKS]
TEXT = (
    st.lists(st.sampled_from([*BITS, *"\n\n\n  "]), max_size=12).map("".join)
    | st.lists(st.sampled_from([*MARKS, *"aB1é"]), max_size=30).map("".join)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
)


@given(text=TEXT)
def test_every_character_but_white_space_is_in_exactly_one_part(text):
    lines, sentences = (find_parts(text, kind) for kind in KINDS)
    stripped = [line.strip() for line in re.split(f"[{NEWLINES}]", text)]
    assert [text[slice(*line)] for line in lines] == [
        line for line in stripped if line
    ] or not text.strip()
    for parts in (lines, sentences):
        assert parts
        owners = np.zeros(len(text), int)
        for start, end in parts:
            owners[start:end] += 1
            assert text[start:end] == text[start:end].strip()
        assert all(
            owner == 1 or (owner == 0 and each.isspace()) for owner, each in zip(owners, text)
        )
        assert parts == sorted(parts)
    # A sentence is of one line.
    assert all(any(a <= c and d <= b for a, b in lines) for c, d in sentences)


@pytest.mark.parametrize("unit", ["。", ".", '."', "! ", "\n ", "A. ", "…", "a", " ", "»:", "།"])
def test_no_text_takes_long(unit):
    find_parts(20_000 * unit, "sentences")  # squared, this would be an hour


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Ours by kind of parts and maximal length, and Hugging Face's own two; the encoder's turns
    newlines into spaces, as NLLB's does.
    """
    folder = tmp_path_factory.mktemp("parts")
    samples = 3 * [*itertools.chain(*SENTENCES.values())]
    build_encoder(folder / "encoder", samples=samples)
    build_decoder(folder / "decoder", samples=samples)

    def normalised(tokenizer):
        steps = [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        return tokenizer

    @cache
    def build(kind, max_length, truncation="aligned", reader=None):
        options = {"parts": kind, "truncation": truncation, "reader": reader}
        pair = PairTokenizer(
            folder / "encoder", folder / "decoder", max_length=max_length, **options
        )
        normalised(pair.encoder)
        return pair

    nllb = normalised(AutoTokenizer.from_pretrained(folder / "encoder", src_lang=SWAHILI))
    return SimpleNamespace(
        build=build, both=(nllb, AutoTokenizer.from_pretrained(folder / "decoder"))
    )


def student_of(text, kind, nllb, llama):
    """(token, first character) of the student's stream and the numbers of its tokens in parts, by
    the definition, character by character.
    """
    runs = [match.span() for match in re.finditer(r"\s+", text)]
    breaks = [[at for at in range(*run) if text[at] in NEWLINES] for run in runs]
    between = {at for each in breaks if each for at in range(each[0], each[-1] + 1)}
    events = []
    for part, span in enumerate(find_parts(text, kind)):
        read = nllb(text[slice(*span)], return_offsets_mapping=True)
        ids, offsets = read["input_ids"], read["offset_mapping"]
        starts = [0, *(start for start, _ in offsets[1:-1]), span[1] - span[0]]
        events += [(span[0], 0, part, token, span[0] + at) for token, at in zip(ids, starts)]
    bare = llama(text, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, end) in zip(bare["input_ids"], bare["offset_mapping"]):
        own = [at for at in range(start, end) if at in between]
        events += [(own[0], 1, -1, token, own[0])] if own else []
    events.sort(key=lambda event: event[:2])
    parts = [event[2] for event in events]
    return [event[3:] for event in events], parts


def fits(text, kind, nllb, llama, max_length):
    teacher = len(llama(text)["input_ids"])
    return max(len(student_of(text, kind, nllb, llama)[0]), teacher) <= max_length


def largest_cut(text, kind, nllb, llama, max_length):
    """By trying all: ends of words, or where the last is in the first half of what fits, of
    graphemes.
    """
    if fits(text, kind, nllb, llama, max_length):
        return len(text)
    ends = [end for end in range(1, len(text)) if text[end].isspace() > text[end - 1].isspace()]
    best = max((end for end in ends if fits(text[:end], kind, nllb, llama, max_length)), default=0)
    student, _ = student_of(text, kind, nllb, llama)
    offsets = llama(text, return_offsets_mapping=True)["offset_mapping"]
    reaches = [student[max_length][1] if len(student) > max_length else len(text)]
    reaches.append(offsets[max_length][0] if len(offsets) > max_length else len(text))
    if 2 * best >= min(reaches):
        return best
    ends = [match.end() for match in regex.finditer(r"\X", text)]
    return max((end for end in ends if fits(text[:end], kind, nllb, llama, max_length)), default=0)


@given(text=TEXT, kind=st.sampled_from(KINDS), max_length=st.sampled_from([8, 16, 32, 64, 512]))
@example(text="", kind="lines", max_length=8)
@example(text="\n \n", kind="sentences", max_length=8)
@example(text="\n\na\n \r\n b. C.\n", kind="lines", max_length=32)
@example(text="a\n" * 30, kind="lines", max_length=16)
@example(text="Aa. " * 30, kind="sentences", max_length=16)
def test_both_sides_read_the_same_characters_and_the_same_newlines(
    tokenizers, text, kind, max_length
):
    nllb, llama = tokenizers.both
    pair = tokenizers.build(kind, max_length)
    cut = largest_cut(text, kind, nllb, llama, max_length) if text else 0
    assume(cut or not text)
    student, teacher = pair.example(text, SWAHILI, NO_ANNOTATIONS)
    expected, parts = student_of(text[:cut], kind, nllb, llama)
    assert teacher.ids_S.tolist() == llama(text[:cut])["input_ids"]
    assert student.ids_S.tolist() == [token for token, _ in expected]
    assert student.offsets_S2[:, 0].tolist() == [start for _, start in expected]
    owners = np.full(len(parts), -1)
    for part, (start, end) in enumerate(student.parts_Q2):
        owners[start:end] = part
    assert owners.tolist() == parts
    assert student.spans_P2.tolist() == [[0, len(expected)]]
    # Every token of a newline that the teacher reads, and no other newline.
    newlines = [
        [
            token
            for token, edges, owner in zip(reading.ids_S.tolist(), reading.offsets_S2, owned)
            if set(text[slice(*edges)]) & set(NEWLINES) and owner < 0
        ]
        for reading, owned in ((student, owners), (teacher, np.full(len(teacher.ids_S), -1)))
    ]
    assert newlines[0] == newlines[1]


def test_a_newlines_token_stands_between_parts_whatever_it_holds_besides(tokenizers):
    """Each once: of two breaks in one token the first has it."""
    merges = [(".", "\n"), ("\n", "b"), ("\nb", "\n")]
    vocabulary = ["a", "b", ".", "\n", *map("".join, merges)]
    llm = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    encoder = tokenizers.both[0].backend_tokenizer
    read = PartsTokenizer(encoder=encoder, llm=llm, prefix=(7,), suffix=(8, 9), kind="lines")
    for text, between in (("a.\na", [".\n"]), ("a\nb", ["\nb"]), ("a\nb\na", ["\nb\n"])):
        encoding = read.encode(text)
        covered = set(itertools.chain(*(range(*part) for part in encoding.parts)))
        rest = [at for at in range(len(encoding.ids)) if at not in covered]
        assert [vocabulary[encoding.ids[at]] for at in rest] == between
        assert [text[slice(*encoding.offsets[at])] for at in rest] == ["\n"]
        for start, end in encoding.parts:
            assert encoding.ids[start] == 7 and encoding.ids[end - 2 : end] == [8, 9]
            first, last = encoding.offsets[start], encoding.offsets[end - 1]
            own = text[first[0] : last[1]]
            assert (
                encoding.ids[start + 1 : end - 2]
                == encoder.encode(own, add_special_tokens=False).ids
            )


@st.composite
def examples(draw):
    """A passage of several sentences, a question and choices of one line each, with an answer."""
    sentence = st.sampled_from([*itertools.chain(*SENTENCES.values()), "Aa. ", "One two. "])
    passage = draw(
        st.lists(sentence, min_size=1, max_size=6).map(draw(st.sampled_from(" \n")).join)
    )
    text, spans = f"{passage}\nwho reads?", []
    for number in range(draw(st.integers(1, 4))):
        start = len(text) + 1
        text += f"\n{number} {draw(sentence)}"
        spans.append((start, len(text)))
    start = draw(st.integers(0, len(passage) - 1))
    answer = (start, draw(st.integers(start + 1, len(passage))))
    assume(text[slice(*answer)].strip())
    return text, Annotations(spans=tuple(spans), cut=(0, len(passage)), answers=(answer,))


@given(given_=examples(), kind=st.sampled_from(KINDS), max_length=st.sampled_from([64, 160, 2000]))
def test_spans_answers_and_partners_are_the_tokens_of_their_characters(
    tokenizers, given_, kind, max_length
):
    (text, annotations), build = given_, tokenizers.build
    try:
        readings = build(kind, max_length).example(text, SWAHILI, annotations)
    except ValueError as error:
        assert "without what may be shortened" in str(error)
        readings = (
            build(kind, max_length, "aligned", "stack").example(text, SWAHILI, annotations)[0],
        )
    for reading in readings:
        assert len(reading.ids_S) <= max_length
        ranges = [*zip(annotations.spans, reading.spans_P2)]
        ranges += zip(annotations.answers, reading.answers_A2)
        for span, (first, last) in ranges:
            own = {at for at in range(*span) if not text[at].isspace()}
            characters = [own & set(range(*edges)) for edges in reading.offsets_S2.tolist()]
            assert characters[first] and characters[last - 1]
            assert not any(characters[:first]) and not any(characters[last:])
            # Any run of tokens inside is a piece of the text, as an answer has to be.
            for a, b in itertools.combinations(range(first, min(last, first + 9)), 2):
                start, *_, end = reading.offsets_S2[a:b].ravel()
                assert start <= end or max_length < 2000  # something was cut out between
    if len(readings) == 2:
        student, teacher = readings
        aligned_S = partners(text, student.offsets_S2, teacher.offsets_S2)
        for token, partner in enumerate(aligned_S.tolist()):
            if partner >= 0:
                assert any(start < token < end - 1 for start, end in student.parts_Q2)
                edges = (student.offsets_S2[token], teacher.offsets_S2[partner])
                assert len({text[slice(*each)].strip() for each in edges}) == 1
        if len(text) < 200 and max_length == 2000:
            assert (aligned_S >= 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_alone_is_cut_alone_and_each_part_ends(tokenizers, kind):
    build, (nllb, llama) = tokenizers.build, tokenizers.both
    text = "one two three. Four five six.\n" * 20
    for truncation, reader in (("independent", None), ("aligned", "stack")):
        student, teacher = build(kind, 40, truncation, reader).example(
            text, SWAHILI, NO_ANNOTATIONS
        )
        size = max(
            cut
            for cut in range(len(text))
            if len(student_of(text[:cut], kind, nllb, llama)[0]) <= 40
            and text[cut].isspace()
            and not text[cut - 1].isspace()
        )
        assert student.ids_S.tolist() == [
            token for token, _ in student_of(text[:size], kind, nllb, llama)[0]
        ]
        if reader is None:
            assert (
                teacher.ids_S.tolist() == llama(text, truncation=True, max_length=40)["input_ids"]
            )


def test_who_reads_parts_is_told(tokenizers):
    assert tokenizers.build("lines", 9).around == (
        "encoder, lines one by one: LANGUAGE ... </s>; LLM: <|begin_of_text|> ..."
    )


@st.composite
def documents(draw):
    """Random tokens in random parts, with and without tokens between and around them."""
    made = []
    for number in range(draw(st.integers(1, 4))):
        edges = draw(st.lists(st.integers(0, 30), min_size=2, max_size=10, unique=True).map(sorted))
        pairs = (
            list(itertools.pairwise(edges))
            if draw(st.booleans())
            else list(zip(edges[::2], edges[1::2]))
        )
        size = edges[-1] + draw(st.integers(0, 3))
        ids = np.arange(100 * number, 100 * number + size, dtype=np.int32)
        about = {
            "student_ids_S": ids,
            "teacher_ids_T": ids[:1],
            "parts_Q2": np.array(pairs, np.int32),
        }
        made.append(Document(key=str(number), seed=number, **about))
    return made


@given(documents=documents())
def test_states_and_embeddings_take_their_places_in_the_stream(documents):
    batch = collate(documents, step_seed=0, device=CPU)
    whole = collate(
        [
            Document(
                key=each.key,
                seed=each.seed,
                student_ids_S=each.student_ids_S,
                teacher_ids_T=each.teacher_ids_T,
            )
            for each in documents
        ],
        step_seed=0,
        device=CPU,
    )
    for name in ("ids_S", "positions_S", "seeds_S", "cu_seqlens"):  # the LLM's stream, and dropout
        assert torch.equal(getattr(batch.student, name), getattr(whole.student, name))
    assert whole.parts is None and whole.encoder is whole.student
    tokens, places_S = batch.encoder, torch.cat([batch.parts.places_U, batch.parts.places_Z])
    assert sorted(places_S.tolist()) == list(range(len(batch.student.ids_S)))
    ids_S = torch.cat([tokens.ids_S, batch.parts.between_Z])
    assert torch.equal(torch.empty_like(ids_S).index_copy(0, places_S, ids_S), batch.student.ids_S)
    expected = sorted(
        (
            each.student_ids_S[start:end].tolist()
            for each in documents
            for start, end in each.parts_Q2
        )
    )
    assert sorted(part.tolist() for part in tokens.ids_S.split(tokens.lengths)) == expected
    assert list(tokens.lengths) == sorted(tokens.lengths)
    assert tokens.cu_seqlens.tolist() == [0, *itertools.accumulate(tokens.lengths)]
    assert tokens.positions_S.tolist() == [at for length in tokens.lengths for at in range(length)]


def test_a_rank_without_documents_has_a_part_too():
    batch = collate([], step_seed=0, device=CPU, idle=replace(IDLE, parts_Q2=ONE_PART))
    assert batch.encoder.lengths == (1,) and not len(batch.parts.between_Z)
