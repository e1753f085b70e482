"""Encoders of every family: how they are told a text's language, and what they read of it."""

import itertools
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, MarianTokenizer
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M_100
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART_50
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB

from mtllm_engine.data.annotations import NO_ANNOTATIONS, Annotations
from mtllm_engine.data.encoder_languages import TRAINED, EncoderLanguages, find_languages
from mtllm_engine.data.parts import find_parts
from mtllm_engine.data.pieces import SentencePieces
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.data.vocabulary import load_tokenizer, read_languages
from mtllm_engine.languages import FLORES_200
from tests.support.cuts import largest_cut
from tests.support.pieces import KINDS, MBART_25, build_m2m_100, build_tokenizers
from tests.support.scripts import SENTENCES
from tests.support.tiny import build_decoder, build_encoder, texts

M2M_TOKENS = [f"__{code}__" for code in M2M_100["m2m100"]]
TOLD = {"m2m-100": "__sw__", "m2m-100 of unigrams": "__sw__", "mbart-50": "sw_KE"}
UNTOLD = ("e5-small", "labse", "xlm-roberta", "t5", "mt5")
ALL = 4000  # tokens of the longest text
SWAHILI, FRENCH = "swh_Latn", "fra_Latn"


def languages(added=(), model_type="", has_pieces=False) -> EncoderLanguages:
    return find_languages(added, model_type=model_type, has_pieces=has_pieces)


def test_the_hundred_languages_of_m2m_100():
    found = languages(M2M_TOKENS, "m2m_100")
    assert found.is_told and not found.is_last and {*found.tokens.values()} == {*M2M_TOKENS}
    assert {*found.tokens} - {*FLORES_200} == {"bre_Latn", "fry_Latn"}
    # Where two letters could mean several of FLORES-200's, or none of them.
    meant = "ar arb_Arab az azj_Latn fa pes_Arab ff fuv_Latn lv lvs_Latn mg plt_Latn mn khk_Cyrl"
    meant += " ms zsm_Latn ne npi_Deva no nob_Latn ns nso_Latn or ory_Orya pa pan_Guru ps pbt_Arab"
    meant += " sq als_Latn sr srp_Cyrl sw swh_Latn uz uzn_Latn yi ydd_Hebr zh zho_Hans"
    for theirs, ours in zip(meant.split()[::2], meant.split()[1::2]):
        assert found.tokens[ours] == f"__{theirs}__"
    for lacking in ("zho_Hant", "arz_Arab", "nno_Latn", "kas_Deva", "ckb_Arab"):
        assert found.resolve(lacking, {}) == (None, "unknown")
    assert found.resolve("nno_Latn", {"nno_Latn": "nob_Latn"}) == ("nob_Latn", "fallback")


def test_the_fifty_two_languages_of_mbart():
    found = languages(MBART_50, "mbart")
    assert found.is_told and not found.is_last and {*found.tokens.values()} == {*MBART_50}
    assert len(found.tokens) == len(MBART_50) == 52 and {*found.tokens} <= {*FLORES_200}
    meant = {"swh_Latn": "sw_KE", "zho_Hans": "zh_CN", "pes_Arab": "fa_IR", "slv_Latn": "sl_SI"}
    assert meant.items() <= found.tokens.items()
    first = languages([*MBART_25, "<mask>"], "mbart")
    assert len(first.tokens) == 25 and first.is_last and first.tokens["eng_Latn"] == "en_XX"


def test_nllbs_tokens_are_codes_and_others_of_that_form_are_languages():
    found = languages([*NLLB, "nij_Latn", "qaa_Latn", "<mask>"], "m2m_100")
    assert found.codes == {*FLORES_200, "nij_Latn", "qaa_Latn"} - {"arb_Latn", "min_Arab"}
    assert {*map(found.token_of, found.codes)} == {*NLLB, "nij_Latn", "qaa_Latn"}
    fallback = {"mad_Latn": "nij_Latn", "swh_Latn": "jav_Latn", "bbc_Latn": "tlh_Piqd"}
    assert found.resolve("sat_Olck", {}) == ("sat_Olck", "known")
    assert found.resolve("mad_Latn", fallback) == ("nij_Latn", "fallback")
    assert found.resolve("swh_Latn", fallback) == ("swh_Latn", "known")
    for code in ("arb_Latn", "min_Arab", "bzd_Latn", "sat_Beng_"):
        assert found.resolve(code, fallback) == (None, "unknown") and not found.knows(code)
    with pytest.raises(ValueError, match=r"fallback\.bbc_Latn=tlh_Piqd: the encoder has no token"):
        found.resolve("bbc_Latn", fallback)
    assert {*found.readable({"mad_Latn": "nij_Latn"})} == {*found.codes, "mad_Latn"}
    for code, message in (
        ("mad_Latn", "no token for the language mad_Latn; the nearest that it has: "),
        ("min_Arab", "no token for the language min_Arab; the nearest that it has: min_Latn"),
        ("sat_Beng", "unknown language 'sat_Beng'; did you mean sat_Olck"),
    ):
        with pytest.raises(ValueError, match=message):
            found.token_of(code)


def test_tables_are_of_as_many_languages_as_their_sources_say():
    """Of CC-100's hundred one is another way to write Burmese, in its own script."""
    sizes = {name: len(languages((), name).codes) for name in TRAINED}
    sizes["e5"] = len(languages((), "bert", has_pieces=True).codes)
    assert sizes.pop("bert") == 109
    assert {sizes.pop(name) for name in ("xlm-roberta", "xlm-roberta-xl", "e5")} == {99}
    assert {*sizes.values()} == {101 + 6}
    lacking = {code for name in TRAINED for code in languages((), name).codes} - {*FLORES_200}
    assert {code for code in lacking if not code.endswith("_Latn")} == set()
    own = "bre_Latn cos_Latn fry_Latn haw_Latn hmn_Latn lat_Latn"
    romanised = "ben bul ell hin jpn rus tam tel urd zho"
    assert lacking == {*own.split(), *(f"{code}_Latn" for code in romanised.split())}


def test_who_takes_no_token_reads_every_language():
    found = languages((), "xlm-roberta")
    assert not found.is_told and found.token_of(SWAHILI) is found.token_of("tlh_Piqd") is None
    fallback = {"ibo_Latn": SWAHILI}
    assert found.resolve(SWAHILI, fallback) == (SWAHILI, "known")
    assert found.resolve("ibo_Latn", fallback) == ("ibo_Latn", "unknown")
    assert found.resolve("zho_Hant", {}).status == "known"
    assert languages((), "bert").resolve("ibo_Latn", {}).status == "known"
    assert languages((), "bert").resolve("zho_Hant", {}).status == "unknown"
    madlad = languages((), "t5")
    assert madlad.resolve("tlh_Piqd", {}) == ("tlh_Piqd", "known") and madlad.knows("nij_Latn")
    for read in (found.token_of, lambda code: found.resolve(code, {})):
        with pytest.raises(ValueError, match="unknown language 'swahili'"):
            read("swahili")


def test_who_should_be_told_and_has_no_tokens_is_refused():
    for model_type in ("m2m_100", "mbart", "llama", ""):
        found = languages(["<mask>"], model_type)
        assert found.is_told and not found.codes
        with pytest.raises(ValueError, match="no token for the language swh_Latn; .* has: none"):
            found.token_of(SWAHILI)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind of encoder; and an LLM's."""
    folder = tmp_path_factory.mktemp("encoders")
    samples = 3 * [*itertools.chain(*SENTENCES.values())]
    llm = build_decoder(folder / "llm", samples=samples)
    nllb = build_encoder(folder / "nllb", samples=samples)
    return {"llm": llm, "nllb": nllb, **build_tokenizers(folder)}


@pytest.fixture(scope="module")
def build_pair(folders):
    @cache
    def build(kind, max_length, prefix="", truncation="aligned", parts="whole"):
        options = {"truncation": truncation, "encoder_prefix": prefix, "parts": parts}
        return PairTokenizer(folders[kind], folders["llm"], max_length=max_length, **options)

    return build


@pytest.fixture(scope="module")
def theirs(folders):
    """Hugging Face's own, in Swahili or another language, and the LLM's."""

    @cache
    def build(kind, token=""):
        token = token or TOLD.get(kind, "")
        options = {"src_lang": token.strip("_")} if token else {}
        llm = AutoTokenizer.from_pretrained(folders["llm"])
        return AutoTokenizer.from_pretrained(folders[kind], **options), llm

    return build


def test_families_are_told_apart(folders):
    found = {kind: read_languages(folders[kind]) for kind in KINDS}
    assert {kind for kind, each in found.items() if not each.is_told} == {*UNTOLD}
    assert {kind for kind, each in found.items() if each.is_last} == {"mbart-25"}
    assert found["e5-small"].codes == found["xlm-roberta"].codes != found["labse"].codes
    assert found["t5"].trained is None and "haw_Latn" in found["mt5"].codes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mbart-25"])
@pytest.mark.parametrize("script", SENTENCES)
def test_an_encoder_reads_what_its_own_tokenizer_makes(build_pair, theirs, kind, script):
    pair, text = build_pair(kind, 200), " ".join(SENTENCES[script])
    encoder, llm = theirs(kind)
    student_ids_S, teacher_ids_T = pair(text, SWAHILI)
    assert student_ids_S.tolist() == encoder(text)["input_ids"]
    assert teacher_ids_T.tolist() == llm(text)["input_ids"]
    assert student_ids_S.max() <= pair.largest_student_id < len(encoder) + len(M2M_TOKENS)


def test_the_token_of_mbarts_first_languages_is_last(build_pair, theirs):
    pair, text = build_pair("mbart-25", 200), SENTENCES["eng_Latn"][0]
    student_ids_S, _ = pair(text, FRENCH)
    encoder, _ = theirs("mbart-25", "fr_XX")
    assert student_ids_S.tolist() == encoder(text)["input_ids"]
    assert encoder.convert_ids_to_tokens(student_ids_S[-2:].tolist()) == ["</s>", "fr_XX"]
    assert pair.around.startswith("encoder: ... </s> LANGUAGE; LLM: ")


def test_around_a_text_in_words(build_pair):
    around = {kind: build_pair(kind, 20).around.partition(";")[0] for kind in KINDS}
    assert around["e5-small"] == "encoder: <s> ... </s>"
    assert around["labse"] == "encoder: [CLS] ... [SEP]"
    assert around["t5"] == "encoder: ... </s>"
    assert around["m2m-100"] == around["mbart-50"] == "encoder: LANGUAGE ... </s>"
    assert build_pair("e5-small", 20, "query: ").around.startswith("encoder: <s> query: ... </s>;")


TEXT = st.lists(
    st.sampled_from([*itertools.chain(*SENTENCES.values()), *"\n.", "  ", "ﬁve…", "x"]),
    min_size=1,
    max_size=4,
).map(" ".join)
FAST = [kind for kind in KINDS if kind not in TOLD]  # whose own tokenizers know offsets too


@pytest.mark.parametrize("kind", FAST)
@given(text=TEXT, max_length=st.sampled_from([6, 12, 24, 40]))
def test_aligned_is_the_largest_cut_of_every_family(build_pair, theirs, kind, text, max_length):
    assume(text.strip())
    pair, code = build_pair(kind, max_length), "eng_Latn"
    reference = theirs(kind, "en_XX" if kind == "mbart-25" else "")
    cut = largest_cut(text, reference, max_length)
    if not cut:
        with pytest.raises(ValueError, match="the first character of the text needs more than"):
            pair(text, code)
        return
    for ours, tokenizer in zip(pair(text, code), reference):
        assert ours.tolist() == tokenizer(text[:cut])["input_ids"] and len(ours) <= max_length


def fits(text, tokenizers, limit):
    return all(len(tokenizer(text)["input_ids"]) <= limit for tokenizer in tokenizers)


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize("truncation", ["aligned", "independent"])
def test_long_texts_for_encoders_whose_own_tokenizers_have_no_offsets(
    build_pair, theirs, kind, truncation
):
    """In scripts that part words: the last one that fits is the last one read."""
    pair, reference = build_pair(kind, 24, "", truncation), theirs(kind)
    for script in ("eng_Latn", "rus_Cyrl", "heb_Hebr", "kat_Geor", "hin_Deva"):
        text = " ".join(SENTENCES[script])
        ends = [end for end in range(len(text) + 1) if text[end : end + 1] in ("", " ")]
        if truncation == "aligned":
            fit = [end for end in ends if fits(text[:end], reference, 24)]
            expected = [each(text[: max(fit)])["input_ids"] for each in reference]
        else:
            whole = reference[0](text)["input_ids"]
            expected = [[*whole[:23], whole[-1]], reference[1](text)["input_ids"][:24]]
        assert [ids.tolist() for ids in pair(text, SWAHILI)] == expected


def check_offsets(text, reading):
    """They lie in the text, in order, and cover all but what has no width."""
    starts_S, ends_S = reading.offsets_S2.T
    is_own_S = starts_S < ends_S
    assert starts_S.min() >= 0 and ends_S.max() <= len(text)
    assert (np.diff(starts_S[is_own_S]) >= 0).all() and (np.diff(ends_S[is_own_S]) >= 0).all()
    covered = {at for start, end in reading.offsets_S2 for at in range(start, end)}
    bare = "".join(each for at, each in enumerate(text) if at not in covered)
    assert not bare.replace("\u200d", "").strip()


@pytest.mark.parametrize("prefix", ["", "passage: ", "x"])
@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@example(text="ﬁve…")
@example(text="  a  b ")
def test_tokens_lie_where_their_characters_are(build_pair, kind, prefix, text):
    assume(text.strip())
    pair = build_pair(kind, ALL, prefix)
    for reading in pair.example(text, "eng_Latn", NO_ANNOTATIONS):
        check_offsets(text, reading)


@pytest.mark.parametrize("kind", ["e5-small", "labse", "t5", "m2m-100", "mbart-50", "nllb"])
@given(text=TEXT, max_length=st.sampled_from([24, 40]))
def test_a_prefix_is_read_and_counted_and_none_of_the_text(build_pair, kind, text, max_length):
    assume(text.strip())
    prefix, bare = "passage: ", build_pair(kind, ALL)
    try:
        readings = build_pair(kind, max_length, prefix).example(text, SWAHILI, NO_ANNOTATIONS)
    except ValueError as error:
        assert "the first character of the text" in str(error)
        return
    student, teacher = readings
    # Both sides read the text up to one place, and the encoder the prefix before it.
    cut = max(each.offsets_S2[:, 1].max() for each in readings)
    assert student.is_cut == teacher.is_cut == bool(text[cut:].strip())
    assert student.ids_S.tolist() == bare(prefix + text[:cut], SWAHILI)[0].tolist()
    assert teacher.ids_S.tolist() == bare(text[:cut], SWAHILI)[1].tolist()
    for each in readings:
        check_offsets(text[:cut], each)
        assert len(each.ids_S) <= max_length
    # The last characters have the tokens and the places that they have without a prefix.
    alone, _ = bare.example(text[:cut], SWAHILI, NO_ANNOTATIONS)
    assert student.offsets_S2[-2:].tolist() == alone.offsets_S2[-2:].tolist()


@pytest.mark.parametrize("kind", ["e5-small", "t5", "m2m-100", "nllb"])
def test_each_part_has_its_prefix(build_pair, kind):
    text = "\n".join(texts(6, seed=1))
    pair, bare = build_pair(kind, ALL, "query: ", parts="lines"), build_pair(kind, ALL)
    student, _ = pair.example(text, SWAHILI, NO_ANNOTATIONS)
    read = [student.ids_S[slice(*part)].tolist() for part in student.parts_Q2]
    lines = [text[slice(*line)] for line in find_parts(text, "lines")]
    assert read == [bare(f"query: {line}", SWAHILI)[0].tolist() for line in lines]
    check_offsets(text, student)


def test_a_prefix_moves_no_range(build_pair):
    text = " ".join(SENTENCES["eng_Latn"])
    spans = ((0, 11), (19, 23))
    for kind in ("e5-small", "labse", "m2m-100"):
        readings = [
            build_pair(kind, 200, prefix).example(text, SWAHILI, Annotations(spans=spans))[0]
            for prefix in ("", "passage: ")
        ]
        bare, prefixed = (
            [each.ids_S[slice(*span)].tolist() for span in each.spans_P2] for each in readings
        )
        assert bare == prefixed


CONTROL = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", "sw_KE", "__sw__", "[CLS]", "[SEP]")
SPELLED = st.lists(
    st.sampled_from(CONTROL) | st.sampled_from(["a", "The", " ", "<", ">", "["]), min_size=1
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=SPELLED)
@example(text="".join(CONTROL))
@example(text=" ".join(CONTROL))
def test_a_control_token_spelled_in_a_text_is_none_for_any_encoder(build_pair, kind, text):
    assume(text.strip())
    pair = build_pair(kind, 300)
    encoder = pair.encoder
    reading, _ = pair.example(text, FRENCH, NO_ANNOTATIONS)
    control = {
        *encoder.all_special_ids,
        *map(encoder.convert_tokens_to_ids, [*MBART_50, *M2M_TOKENS]),
    }
    starts_S, ends_S = reading.offsets_S2.T
    body = {*reading.ids_S[starts_S < ends_S].tolist()}
    assert not body & (control - {encoder.unk_token_id})
    check_offsets(text, reading)


@pytest.fixture(scope="module")
def slow(folders, tmp_path_factory):
    """transformers' own, ours, and such a pair whose vocabulary lacks a piece."""
    folder = tmp_path_factory.mktemp("slow")
    lacking = build_m2m_100(folder, folders["llm"].parent / "bpe.model", lacks="▁the")
    complete = [load_tokenizer(folders[kind]) for kind in ("m2m-100", "m2m-100 of unigrams")]
    return [(each, SentencePieces(each)) for each in (*complete, lacking)]


@given(text=TEXT | st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | SPELLED)
@example(text="the end of the line")
@example(text="")
@example(text="  the ")
def test_m2m_100s_pieces_are_transformers(slow, text):
    for theirs, ours in slow:
        tokens = ours.encode(text, add_special_tokens=False)
        expected = theirs.convert_tokens_to_ids(theirs._tokenize(text))
        assert list(tokens.ids) == expected
        for (start, _), (following, _) in itertools.pairwise(tokens.offsets):
            assert 0 <= start <= following
    assert slow[2][0].unk_token_id in slow[2][1].encode("the", add_special_tokens=False).ids


def test_a_character_of_several_pieces_is_each_ones(slow):
    """As with other encoders' tokenizers."""
    for theirs, ours in slow:
        tokens = ours.encode("dust…", add_special_tokens=False)
        assert theirs.convert_ids_to_tokens(tokens.ids[-3:]) == [".", ".", "."]
        assert tokens.offsets[-3:] == [(4, 5)] * 3


def test_m2m_100_without_sentencepiece_says_what_to_install(folders):
    code = "import sys; sys.modules['sentencepiece'] = None\n"
    code += "from mtllm_engine.data.vocabulary import load_tokenizer\n"
    code += "try: load_tokenizer(sys.argv[1])\nexcept ValueError as error: print(error)"
    command = [sys.executable, "-c", code, str(folders["m2m-100"])]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.endswith("it needs a package that is not here: pip install sentencepiece\n")


def test_a_tokenizer_without_offsets_is_refused(folders, tmp_path):
    model = Path(folders["llm"]).parent / "unigram.model"
    vocabulary = Path(folders["llm"]).parent / "unigram.json"
    spm = {"source_spm": str(model), "target_spm": str(model), "vocab": str(vocabulary)}
    MarianTokenizer(**spm).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(MarianTokenizer\) has no tokenizer.json, and so does"):
        load_tokenizer(tmp_path)
