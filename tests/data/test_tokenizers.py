import io
import json
import os
import shutil
import sys
from functools import cache

import numpy as np
import pytest
import regex
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from mtllm_engine.data.annotations import Annotations
from mtllm_engine.data.tokenizers import PairTokenizer, Side, load_tokenizer
from mtllm_engine.languages import FLORES_200
from mtllm_engine.model.build import load_config
from tests.support.cuts import grapheme_ends, largest_cut, word_ends
from tests.support.tiny import WORDS, build_decoder, build_encoder

CHINESE = "自我蒸馏让学生模型读懂老师所读的文本无论文本用哪种语言写成。"
THAI = "การกลั่นตัวเองสอนแบบจำลองให้คิดเหมือนครูไม่ว่าข้อความจะเป็นภาษาใด"
ACCENTS = "é̄ạ̃ñ̈ क्षि हिन्दी नमस्ते ཨོཾ"
EMOJI = "👨‍👩‍👧‍👦👩🏽‍🚀🇩🇪🇫🇷👍🏿❤️‍🔥"
SPACES = "a\u00a0b\u3000c\n\n\td   e\r\n\u200bf\u2028"
SCRIPTS = (CHINESE, THAI, ACCENTS, EMOJI, SPACES)
LENGTHS = (4, 5, 6, 8, 12, 16, 24)
SWAHILI = "swh_Latn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder's and a decoder's folder."""
    folder = tmp_path_factory.mktemp("tokenizers")
    build_encoder(folder / "encoder", samples=3 * SCRIPTS)
    build_decoder(folder / "decoder", samples=3 * SCRIPTS)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    """Hugging Face's own tokenizers, student and teacher."""
    nllb = AutoTokenizer.from_pretrained(folder / "encoder", src_lang=SWAHILI)
    return normalise_as_nllb(nllb), AutoTokenizer.from_pretrained(folder / "decoder")


@pytest.fixture(scope="module")
def build_pair(folder):
    """Ours, by maximal length and kind of truncation."""

    @cache
    def build(max_length, truncation="aligned"):
        pair = PairTokenizer(
            folder / "encoder", folder / "decoder", max_length=max_length, truncation=truncation
        )
        normalise_as_nllb(pair.encoder)
        return pair

    return build


def normalise_as_nllb(tokenizer):
    """Like NLLB's: characters are unified, some dropped, and runs of spaces count once."""
    steps = [
        normalizers.NFKC(),
        normalizers.Replace(Regex("[\u200b\u200d]"), ""),
        normalizers.Replace(Regex(" +"), " "),
    ]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


WORD = st.sampled_from([*WORDS[:300], *(word for script in SCRIPTS for word in script.split())])
GRAPHEME = st.sampled_from([*regex.findall(r"\X", "".join(SCRIPTS)), *"     abc"])
TEXT = (
    st.lists(WORD, min_size=1, max_size=30).map(" ".join)
    | st.lists(GRAPHEME, min_size=1, max_size=60).map("".join)
    | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
)


def check_aligned(text, pair, reference):
    """Both sides are what Hugging Face makes of the text up to the largest cut; returns the cut."""
    cut = largest_cut(text, reference, pair.max_length)
    if not cut:
        message = f"first character .* more than data.max_length={pair.max_length} tokens"
        with pytest.raises(ValueError, match=message):
            pair(text, SWAHILI)
        return 0
    for ours, tokenizer in zip(pair(text, SWAHILI), reference):
        assert ours.tolist() == tokenizer(text[:cut])["input_ids"]
        assert len(ours) <= pair.max_length and ours.dtype == np.int32
    return cut


@given(text=TEXT, max_length=st.sampled_from(LENGTHS))
@example(text="a \u200b \u200b \u200b b " * 9, max_length=12)
@example(text="e" + 90 * "\u0301", max_length=24)
@example(text=" " * 90 + "a b", max_length=6)
def test_aligned_is_the_largest_cut(reference, build_pair, text, max_length):
    assume(text.strip())
    check_aligned(text, build_pair(max_length), reference)


@pytest.mark.parametrize("max_length", [24, 64])
@pytest.mark.parametrize("script", SCRIPTS, ids=("chinese", "thai", "accents", "emoji", "spaces"))
def test_long_texts_of_every_script(reference, build_pair, script, max_length):
    text = 8 * script
    cut = check_aligned(text, build_pair(max_length), reference)
    assert max_length // 8 < cut < len(text)


def test_a_title_before_unspaced_text_is_not_all_that_remains(reference, build_pair):
    assert check_aligned(f"标题 {4 * CHINESE}", build_pair(24), reference) > len("标题")


@pytest.fixture(scope="module")
def unsplit(folder, reference, tmp_path_factory):
    """A pair whose teacher does not split text at spaces: what follows can change a token."""
    merges = [("γ", " "), ("β", "γ"), ("λ", "μ"), ("λμ", "ν"), ("κ", "λμ")]
    tokens = ["<unk>", *"αβγκλμν ", *map("".join, merges)]
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True
        )
    )
    decoder = tmp_path_factory.mktemp("unsplit")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(decoder)
    pair = PairTokenizer(folder / "encoder", decoder, max_length=11)
    normalise_as_nllb(pair.encoder)
    return pair, (reference[0], AutoTokenizer.from_pretrained(decoder))


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("αβγ αβγ αβγ αβγ αβγ αβγ", "αβγ αβγ αβγ αβγ"),  # before the space, βγ is one token
        (9 * "κλμν", 5 * "κλμν" + "κλμ"),  # at the end, κλμ is one token, but κλ are two
        (600 * "Ω" + " α", 600 * "Ω" + " α"),  # what is unknown is one token, however long
        (600 * "Ω" + 99 * " α", None),
    ],
    ids=["word", "grapheme", "all", "long"],
)
def test_tokens_that_depend_on_what_follows(unsplit, text, cut):
    pair, reference = unsplit
    assert text[: check_aligned(text, pair, reference)] == cut or cut is None


@given(text=TEXT, max_length=st.sampled_from(LENGTHS))
@example(text=8 * CHINESE, max_length=24)
@example(text=600 * "Ω" + " after what is unknown", max_length=6)
def test_independent_is_hugging_faces_truncation(reference, build_pair, text, max_length):
    for ours, tokenizer in zip(build_pair(max_length, "independent")(text, SWAHILI), reference):
        assert ours.tolist() == tokenizer(text, truncation=True, max_length=max_length)["input_ids"]


TEN_KILOBYTES, TEN_MEGABYTES = 10_000, 10_000_000
LONG = {"words": "self distillation ", "no spaces": CHINESE, "one word": "a", "lines": "a\n"}


@pytest.fixture
def encoded(monkeypatch):
    """The lengths of all texts handed to a tokenizer."""
    lengths, encode = [], Side.encode
    monkeypatch.setattr(
        Side, "encode", lambda side, text: lengths.append(len(text)) or encode(side, text)
    )
    return lengths


@pytest.mark.parametrize("truncation", ["aligned", "independent"])
@pytest.mark.parametrize("unit", LONG.values(), ids=LONG.keys())
def test_a_book_costs_what_a_page_costs(build_pair, encoded, unit, truncation):
    pair = build_pair(64, truncation)
    pair(unit * (TEN_KILOBYTES // len(unit)), SWAHILI)
    page = sum(encoded)
    pair(unit * (TEN_MEGABYTES // len(unit)), SWAHILI)
    assert sum(encoded) - page == page < TEN_KILOBYTES


def test_a_grapheme_as_long_as_a_book_is_refused_at_once(build_pair, encoded):
    with pytest.raises(ValueError, match="first character"):
        build_pair(64)("e" + TEN_MEGABYTES // 2 * "\u0301", SWAHILI)
    assert sum(encoded) < TEN_KILOBYTES


@pytest.mark.parametrize("language", [SWAHILI, "eng_Latn", "zho_Hans", "sat_Olck"])
def test_special_tokens_are_nllbs_and_llamas(build_pair, reference, language):
    nllb, llama = reference
    student_ids_S, teacher_ids_T = build_pair(24)("self text", language)
    token = {"sat_Olck": "sat_Beng"}.get(language, language)
    body = nllb("self text", add_special_tokens=False)["input_ids"]
    assert student_ids_S.tolist() == [nllb.convert_tokens_to_ids(token), *body, nllb.eos_token_id]
    assert teacher_ids_T.tolist() == llama("self text")["input_ids"]
    assert teacher_ids_T[0] == llama.bos_token_id


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> <s> $A </s>"])
@pytest.mark.parametrize("truncation", ["aligned", "independent"])
def test_teachers_special_tokens_are_found(folder, tmp_path, template, truncation):
    backend = Tokenizer.from_file(str(folder / "decoder" / "tokenizer.json"))
    backend.add_special_tokens(["<s>", "</s>"])
    specials = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path)
    pair = PairTokenizer(folder / "encoder", tmp_path, max_length=12, truncation=truncation)
    assert pair("a text", SWAHILI)[1].tolist() == expected("a text")["input_ids"]
    cut = pair("a text that is too long for it", SWAHILI)[1].tolist()
    num_before, num_after = template.split().index("$A"), template.count("</s>")
    assert cut[:num_before] == num_before * [backend.token_to_id("<s>")]
    assert cut[len(cut) - num_after :] == num_after * [backend.token_to_id("</s>")]


def test_every_code_of_nllb_and_no_other(build_pair):
    pair = build_pair(24)
    tokens = pair.languages.tokens.values()
    assert len(tokens) == 202 and {*tokens} == set(FAIRSEQ_LANGUAGE_CODES)
    prefixes = {
        pair.student(code).prefix for code in FLORES_200 if code not in ("arb_Latn", "min_Arab")
    }
    assert prefixes == {(pair.encoder.convert_tokens_to_ids(token),) for token in tokens}
    assert pair.encoder.unk_token_id not in {prefix[0] for prefix in prefixes}


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ("arb_Latn", "tokenizer has no token for the language arb_Latn"),
        ("min_Arab", "tokenizer has no token for the language min_Arab"),
        ("swa_Latn", "unknown language 'swa_Latn'; did you mean .*swh_Latn"),
        ("en", "unknown language 'en'; did you mean .*eng_Latn"),
        ("sat_Beng", "unknown language 'sat_Beng'; did you mean .*sat_Olck"),
    ],
)
def test_languages_without_a_token_are_errors(build_pair, language, message):
    with pytest.raises(ValueError, match=message):
        build_pair(24)("a text", language)


def test_folder_without_tokenizer_is_named_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=f"cannot load a tokenizer from {tmp_path}") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def edit_json(path, **keys):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | keys))


BROKEN = {  # what is done to an encoder's folder, and what is said of it
    "no tokenizer_config.json": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        "it has no tokenizer_config.json; copy that from the model",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "it has no tokenizer_config.json and no tokenizer.json",
    ),
    "no end": (
        lambda folder: edit_json(folder / "tokenizer_config.json", eos_token=None),
        "its tokenizer_config.json has no eos_token; give it the model's",
    ),
    "another version": (
        lambda folder: edit_json(folder / "tokenizer.json", model={"type": "BPE2"}),
        "its files are damaged, or not of this version .*: data did not match",
    ),
    "empty": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "its files are damaged, or not of this version",
    ),
    "cut": (lambda folder: (folder / "tokenizer.json").write_text('{"model"'), ".* line 1 column"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_a_tokenizer_is_told_in_one_line(folder, tmp_path, damage, message):
    copy = shutil.copytree(folder / "encoder", tmp_path / "encoder")
    damage(copy)
    with pytest.raises(ValueError, match=f"load a tokenizer from {copy}: {message}") as error:
        load_tokenizer(copy)
    assert "\n" not in str(error.value)


def test_an_encoder_whose_texts_do_not_end_is_refused_where_it_is_read(folder):
    """The LLM's tokenizer stands for one without eos_token."""
    sides = (folder / "decoder", folder / "decoder")
    with pytest.raises(ValueError, match="decoder has no eos_token; give its tokenizer_config"):
        PairTokenizer(*sides, max_length=9)
    assert PairTokenizer(*sides, max_length=9, reader="llm")("a", SWAHILI)[0].size


def extended(folder, out, tokens, *, special):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.save_pretrained(out)
    return out, len(tokenizer) - 1


def test_an_encoder_reads_the_languages_that_it_was_given(folder, tmp_path):
    encoder, added = extended(folder / "encoder", tmp_path, ["nij_Latn"], special=True)
    pair = PairTokenizer(encoder, folder / "decoder", max_length=24)
    assert pair("a text", "nij_Latn")[0][0] == added == pair.largest_student_id
    with pytest.raises(ValueError, match="no token for the language bzd_Latn; the nearest"):
        pair("a text", "bzd_Latn")


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_ids_that_no_text_has_do_not_count(folder, tmp_path, side, special):
    """A token for padding, as fine-tuned models have it; one of words does."""
    other, added = extended(folder / side, tmp_path / side, ["<more>"], special=special)
    folders = {"encoder": folder / "encoder", "decoder": folder / "decoder", side: other}
    pair = PairTokenizer(*folders.values(), max_length=24)
    largest = pair.largest_student_id if side == "encoder" else pair.largest_teacher_id
    assert largest == (added - 1 if special else added)
    ids_S = pair("a <more> text", SWAHILI)[side == "decoder"]
    assert (added in ids_S.tolist()) == (not special) and ids_S.max() <= largest


SENTENCES = (
    "the teacher reads texts that are longer, Ünïcode too. 1 2 3 4",
    "учитель читает текст который длиннее других слово за словом",
    "يقرأ المعلم نصا أطول من غيره كلمة كلمة",
    "शिक्षक एक लंबा पाठ पढ़ता है शब्द दर शब्द",
    CHINESE,
    THAI,
)


@pytest.fixture(scope="module")
def polyglot(tmp_path_factory):
    """Ours by maximal length, and Hugging Face's own two, on sentences of several languages.

    The encoder's turns newlines into spaces, as NLLB's does.
    """
    folder = tmp_path_factory.mktemp("polyglot")
    build_encoder(folder / "encoder", samples=9 * SENTENCES)
    build_decoder(folder / "decoder", samples=9 * SENTENCES)

    def normalised(tokenizer):
        steps = [
            normalizers.NFKC(),
            normalizers.Replace("\u200b", ""),
            normalizers.Replace(Regex("[ \n]+"), " "),
        ]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        return tokenizer

    @cache
    def build(max_length, truncation="aligned", reader=None):
        options = {"max_length": max_length, "truncation": truncation, "reader": reader}
        pair = PairTokenizer(folder / "encoder", folder / "decoder", **options)
        normalised(pair.encoder)
        return pair

    nllb = normalised(AutoTokenizer.from_pretrained(folder / "encoder", src_lang=SWAHILI))
    return build, (nllb, AutoTokenizer.from_pretrained(folder / "decoder"))


TRUNCATIONS = ("aligned", "independent")
PARTS = [part for text in SENTENCES for part in (*text.split(), text[:7], text[-9:-3])]
PIECE = st.sampled_from([*PARTS, "1", "2 2", "."])
PIECES = st.builds(str.join, st.sampled_from([" ", "", "\n", "  "]), st.lists(PIECE, max_size=6))


@st.composite
def examples(draw):
    """A passage, a question and numbered choices, which may be empty, repeat and hold newlines."""
    passage = draw(st.lists(PIECE, max_size=30).map(" ".join) | PIECES)
    text, spans = f"{passage}{draw(st.sampled_from([' ', chr(10)]))}{draw(PIECES)}", []
    options = draw(
        st.lists(
            PIECES | st.sampled_from(["", " ", "\u200b", "again\n again \n"]),
            min_size=1,
            max_size=4,
        )
    )
    for number, option in enumerate(options, start=1):
        start = len(text) + 1
        text += f"\n{number} {option}"
        spans.append((start, len(text)))
    return text, Annotations(spans=tuple(spans), cut=(0, len(passage)), label=0)


def kept_of_passage(text, cut, tokenizers, max_length):
    """By trying all: how many characters of the cut remain; None: the text fits, -1: none do."""

    def fits(kept):
        return all(
            len(tokenizer(text[: cut[0] + kept] + text[cut[1] :])["input_ids"]) <= max_length
            for tokenizer in tokenizers
        )

    passage = text[slice(*cut)]
    if fits(len(passage)):
        return None
    if not fits(0):
        return -1
    best_word = max(filter(fits, word_ends(passage)), default=0)
    if 2 * best_word >= min(start_of_surplus(text, cut, each, max_length) for each in tokenizers):
        return best_word
    return max(filter(fits, grapheme_ends(passage)), default=0)


def start_of_surplus(text, cut, tokenizer, max_length):
    """How many of the cut's characters come before as many of its tokens as are too many."""
    bare = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    surplus = len(bare) + tokenizer.num_special_tokens_to_add() - max_length
    starts = [start for start, end in bare if start < cut[1] and end > cut[0]]
    if surplus <= 0:
        return len(text)
    return max(0, starts[-surplus] - cut[0]) if surplus <= len(starts) else 0


def overlapping(offsets, text, span):
    """The tokens that have a character of a span which is not white space at its ends."""
    inside = set(range(*span))
    inside -= {index for index in range(*span) if not text[span[0] : index + 1].strip()}
    inside -= {index for index in range(*span) if not text[index : span[1]].strip()}
    return [token for token, edges in enumerate(offsets) if inside & set(range(*edges))]


def check_reading(reading, tokenizer, text, kept, annotations):
    """A side reads what Hugging Face makes of what is left; a span's tokens are its text's."""
    start, end = annotations.cut
    start, end = (len(text), len(text)) if kept is None else (start + kept, end)
    theirs = tokenizer(text[:start] + text[end:], return_offsets_mapping=True)
    assert reading.ids_S.tolist() == theirs["input_ids"] and reading.ids_S.dtype == np.int32
    left = [*range(start), *range(end, len(text))]
    there = [[left[a], left[b - 1] + 1] if a < b else None for a, b in theirs["offset_mapping"]]
    ours = reading.offsets_S2.tolist()
    assert [offsets for offsets, pair in zip(ours, there, strict=True) if pair] == [
        pair for pair in there if pair
    ]
    for span, (first, last) in zip(annotations.spans, reading.spans_P2.tolist(), strict=True):
        own = overlapping(ours, text, span)
        assert (first, last) == (own[0], own[-1] + 1)
        if "\u200b" in text[slice(*span)]:  # dropped by the encoder, which keeps spaces beside it
            continue
        alone = tokenizer(text[slice(*span)].strip(), add_special_tokens=False).tokens()
        tokens = tokenizer.convert_ids_to_tokens(reading.ids_S[first:last].tolist())
        assert tokens == alone[alone[0] == "▁" :]


@given(example_=examples(), max_length=st.sampled_from([8, 16, 24, 40, 200]))
def test_spans_are_the_choices_tokens_and_the_passage_is_shortened(polyglot, example_, max_length):
    build, tokenizers = polyglot
    (text, annotations), pair = example_, build(max_length)
    kept = kept_of_passage(text, annotations.cut, tokenizers, max_length)
    if kept == -1:
        message = f"more than data.max_length={max_length} tokens without what may be"
        with pytest.raises(ValueError, match=message):
            pair.example(text, SWAHILI, annotations)
        return
    for reading, tokenizer in zip(pair.example(text, SWAHILI, annotations), tokenizers):
        check_reading(reading, tokenizer, text, kept, annotations)
        assert len(reading.ids_S) <= max_length and not len(reading.answers_A2)


@given(example_=examples(), max_length=st.sampled_from([16, 40]))
def test_independent_shortens_each_side_alone(polyglot, example_, max_length):
    build, tokenizers = polyglot
    text, annotations = example_
    kept = [
        kept_of_passage(text, annotations.cut, [tokenizer], max_length) for tokenizer in tokenizers
    ]
    assume(-1 not in kept)
    readings = build(max_length, "independent").example(text, SWAHILI, annotations)
    for reading, tokenizer, remaining in zip(readings, tokenizers, kept):
        check_reading(reading, tokenizer, text, remaining, annotations)


@pytest.mark.parametrize("reader", ["stack", "llm"])
@given(
    example_=examples(),
    max_length=st.sampled_from([24, 32, 40]),
    truncation=st.sampled_from(TRUNCATIONS),
)
def test_a_text_is_cut_for_those_alone_who_read_it(
    polyglot, reader, example_, max_length, truncation
):
    build, (text, annotations) = polyglot[0], example_
    tokenizer = polyglot[1][reader == "llm"]
    kept = kept_of_passage(text, annotations.cut, [tokenizer], max_length)
    pair = build(max_length, truncation, reader)
    reading, same = pair.example(text, SWAHILI, annotations)
    assert same.ids_S.tolist() == reading.ids_S.tolist()
    assert same.spans_P2.tolist() == reading.spans_P2.tolist()
    if kept == -1:  # of each choice its start is left
        assert max_length // 2 < len(reading.ids_S) <= max_length
        starts = [reading.offsets_S2[first].tolist() for first, _ in reading.spans_P2]
        begins = [begin for begin, _ in annotations.spans]
        assert all(first <= begin < last for begin, (first, last) in zip(begins, starts))
    else:
        check_reading(reading, tokenizer, text, kept, annotations)
    student_ids_S, _ = pair(text, SWAHILI)
    whole = tokenizer(text)["input_ids"]
    assert len(whole) > max_length or student_ids_S.tolist() == whole


def test_the_longest_parts_of_a_text_are_shortened_alike(polyglot):
    """A passage, a question and two choices; of each part so many tokens remain, and no more."""
    parts = ["passage " * 30, "q ", "\n", "1 " + "reads " * 30, "\n", "2 b"]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    annotations = Annotations(
        spans=((ends[2], ends[3]), (ends[4], ends[5])),
        cut=(0, ends[0]),
        answers=((0, 7), (ends[0] - 9, ends[0])),
    )
    build, (_, llama) = polyglot
    reading, _ = build(40, "aligned", "llm").example("".join(parts), SWAHILI, annotations)
    counts = np.bincount(
        np.searchsorted(ends, reading.offsets_S2[1:, 0], side="right"), minlength=6
    )
    whole = [len(llama(part, add_special_tokens=False)["input_ids"]) for part in parts]
    assert counts[0] == counts[3] < min(whole[0], whole[3]) and len(reading.ids_S) > 37
    assert counts[[1, 2, 4, 5]].tolist() == [whole[part] for part in (1, 2, 4, 5)]
    assert len(reading.answers_A2) == 1  # the other one was cut away


def test_of_a_passage_that_is_asked_about_something_remains(polyglot):
    """Beside a question so long that nothing fits behind it; what both sides read is an error."""
    question = "reads " * 21
    text = f"{question}\nteacher and student"
    span = (len(question) + 1, len(text))
    annotations = Annotations(spans=(span,), cut=span)
    for reader in ("stack", "llm"):
        for reading in polyglot[0](24, "aligned", reader).example(text, SWAHILI, annotations):
            ((first, last),) = reading.spans_P2
            assert last > first and len(reading.ids_S) <= 24


@given(
    words=st.lists(PIECE, min_size=1, max_size=30),
    max_length=st.sampled_from([24, 200]),
    data=st.data(),
)
def test_answers_are_found_unless_they_are_cut_away(polyglot, words, max_length, data):
    """The same ones on both sides; the passage is the one span."""
    build, tokenizers = polyglot
    question, passage = "who reads\n", " ".join(words)
    text, cut = question + passage, (len(question), len(question) + len(passage))
    ranges = st.integers(cut[0], cut[1]).flatmap(
        lambda start: st.tuples(st.just(start), st.integers(start, cut[1]))
    )
    answer = ranges.filter(lambda each: text[slice(*each)].strip())
    answers = tuple(data.draw(st.lists(answer, max_size=4)))
    kept = kept_of_passage(text, cut, tokenizers, max_length)
    end = cut[1] if kept is None else cut[0] + kept
    assume(text[cut[0] : end].strip())
    annotations = Annotations(spans=(cut,), answers=answers, cut=cut)
    readings = build(max_length).example(text, SWAHILI, annotations)
    expected = [answer for answer in answers if answer[1] <= end]
    for reading, tokenizer in zip(readings, tokenizers):
        assert reading.ids_S.tolist() == tokenizer(text[:end])["input_ids"]
        offsets = reading.offsets_S2.tolist()
        tokens = [*reading.spans_P2.tolist(), *reading.answers_A2.tolist()]
        for span, pair in zip((cut, *expected), tokens, strict=True):
            own = overlapping(offsets, text, span)
            assert pair == [own[0], own[-1] + 1]


@given(
    text=TEXT,
    max_length=st.sampled_from(LENGTHS),
    truncation=st.sampled_from(["aligned", "independent"]),
)
def test_an_example_without_ranges_is_read_as_a_document(build_pair, text, max_length, truncation):
    pair = build_pair(max_length, truncation)
    try:
        expected = pair(text, SWAHILI)
    except ValueError:
        assume(False)
    for reading, ids in zip(pair.example(text, SWAHILI, Annotations(label=3)), expected):
        assert reading.ids_S.tolist() == ids.tolist()
        assert reading.spans_P2.tolist() == [[0, len(ids)]]
        assert not len(reading.answers_A2) and len(reading.offsets_S2) == len(ids)


@pytest.mark.parametrize(
    ("text", "annotations", "message"),
    [
        ("a b", Annotations(spans=((0, 4),)), r"spans: \[0, 4\) is not in the text's 3 characters"),
        ("a b", Annotations(cut=(-1, 2)), r"cut: \[-1, 2\) is not in"),
        ("a b", Annotations(answers=((2, 1),)), r"answers: \[2, 1\) is not in"),
        (
            "a b",
            Annotations(spans=((2, 3), (0, 1))),
            "spans: one starts at 0, before the one before it ends at 3",
        ),
        ("a  b", Annotations(spans=((1, 3),)), "the encoder has no token for the span '  '"),
        (
            "a \u200b",
            Annotations(spans=((2, 3),)),
            r"the encoder has no token for the span '\\u200b'",
        ),
        (
            "teacher",
            Annotations(spans=((0, 6), (6, 7))),
            "one token of the encoder is in the span 'r' and in the one before it",
        ),
        (
            99 * "teacher ",
            Annotations(spans=((0, 7),)),
            "more than data.max_length=24 tokens and may not be cut",
        ),
    ],
)
def test_spans_that_cannot_be_pooled_are_errors(polyglot, text, annotations, message):
    with pytest.raises(ValueError, match=message) as error:
        polyglot[0](24).example(text, SWAHILI, annotations)
    assert "\n" not in str(error.value)


def test_a_document_costs_no_more_for_examples_sake(build_pair, encoded):
    build_pair(64)("a short text", SWAHILI)
    assert encoded == [12, 12]


CONTROL = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", SWAHILI, "eng_Latn", "<|begin_of_text|>")
SPELLED = st.lists(
    st.sampled_from(CONTROL) | st.sampled_from(["a", "text", " ", "\n", "<", ">"]), min_size=1
).map("".join)


@given(text=SPELLED, language=st.sampled_from([SWAHILI, "eng_Latn"]))
@example(text="".join(CONTROL), language=SWAHILI)
@example(text="</s>", language=SWAHILI)
def test_a_control_token_spelled_in_a_text_is_its_characters(build_pair, text, language):
    """None comes out but those around it, and its characters do."""
    assume(text.strip())
    pair = build_pair(200)
    student_ids_S, teacher_ids_T = pair(text, language)
    nllb, llama = pair.encoder, pair.decoder
    around = (
        ([nllb.convert_tokens_to_ids(language)], [nllb.eos_token_id]),
        ([llama.bos_token_id], []),
    )
    for ids, tokenizer, (before, after) in zip(
        (student_ids_S, teacher_ids_T), (nllb, llama), around
    ):
        ids = ids.tolist()
        body = ids[len(before) : len(ids) - len(after)]
        assert ids == [*before, *body, *after]
        control = {
            *tokenizer.all_special_ids,
            *map(tokenizer.convert_tokens_to_ids, pair.languages.tokens.values()),
        }
        assert not set(body) & (control - {tokenizer.unk_token_id})
    # What the teacher reads is the text; the encoder may lack a character.
    assert llama.decode(teacher_ids_T[1:]) == text
    readings = pair.example(text, language, Annotations(label=0))
    assert [each.ids_S.tolist() for each in readings] == [
        student_ids_S.tolist(),
        teacher_ids_T.tolist(),
    ]


def test_a_control_token_stays_characters_whatever_else_is_asked(folder):
    """transformers sets the backend's flag at each call of its own."""
    for side in ("encoder", "decoder"):
        tokenizer = load_tokenizer(folder / side)
        backend, start = tokenizer.backend_tokenizer, tokenizer.bos_token
        before = backend.encode(f"a {start}", add_special_tokens=False).ids
        assert tokenizer.bos_token_id not in before
        tokenizer("a text", add_special_tokens=False)
        assert backend.encode(f"a {start}", add_special_tokens=False).ids == before


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (None, "encoder: LANGUAGE ... </s>; LLM: <|begin_of_text|> ..."),
        ("stack", "encoder: LANGUAGE ... </s>"),
        ("llm", "LLM: <|begin_of_text|> ..."),
    ],
)
def test_what_is_put_around_a_text_is_told(folder, reader, words):
    pair = PairTokenizer(folder / "encoder", folder / "decoder", max_length=9, reader=reader)
    assert pair.around == words


def test_a_lost_start_of_text_is_told(folder, tmp_path):
    backend = Tokenizer.from_file(str(folder / "decoder" / "tokenizer.json"))
    backend.post_processor = processors.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    pair = PairTokenizer(folder / "encoder", tmp_path, max_length=9, reader="llm")
    assert pair.around == "LLM: nothing put around them"


CODE = "import pathlib; pathlib.Path({mark!r}).touch()\nclass Mine: pass\n"


def closed_stdin():
    with open(os.devnull) as stdin:
        return stdin


STDINS = {"closed": closed_stdin, "yes": lambda: io.StringIO(9 * "y\n")}


@pytest.mark.parametrize("stdin", STDINS.values(), ids=STDINS)
@pytest.mark.parametrize("part", ["tokenizer", "model"])
def test_code_in_a_folder_is_never_run_and_nobody_is_asked(
    folder, tmp_path, monkeypatch, stdin, part
):
    copy, mark = tmp_path / "copy", tmp_path / "it ran"
    shutil.copytree(folder / "decoder", copy)
    (copy / "mine.py").write_text(CODE.format(mark=str(mark)))
    path = copy / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
    edits = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    if part == "model":
        edits = {"auto_map": {"AutoConfig": "mine.Mine"}, "model_type": "mine"}
    else:
        (copy / "config.json").unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | edits))
    monkeypatch.setattr("sys.stdin", stdin())
    with pytest.raises(ValueError, match=f"{copy}.* its own.*, which is never run") as error:
        if part == "tokenizer":
            load_tokenizer(copy)
        else:
            load_config(copy, LlamaConfig, "model.decoder")
    assert "\n" not in str(error.value) and not mark.exists()
    assert sys.stdin.closed or sys.stdin.read() == 9 * "y\n"


def test_a_known_model_with_code_beside_it_is_read_without_it(folder, tmp_path, monkeypatch):
    """As LLM2Vec's folders have it: a Llama all the same."""
    copy, mark = tmp_path / "copy", tmp_path / "it ran"
    shutil.copytree(folder / "decoder", copy)
    (copy / "mine.py").write_text(CODE.format(mark=str(mark)))
    for name, edits in (
        ("config.json", {"auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}),
    ):
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | edits))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    config = load_config(copy, LlamaConfig, "model.decoder")
    assert config.to_dict()["hidden_size"] == 48
    load_tokenizer(copy)
    assert sys.stdin.read() == "y\n" and not mark.exists()
