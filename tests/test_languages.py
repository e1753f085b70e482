import pytest
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from mtllm_engine.data.encoder_languages import TRAINED, _codes
from mtllm_engine.languages import (
    FLORES_200,
    NAMES,
    OTHER_CODES,
    SCRIPTS,
    check_code,
    check_language,
    flores_code,
    is_well_formed,
    nllb_token,
)
from mtllm_engine.tasks import load_task, task_names


def test_codes_are_those_of_nllb_and_the_two_it_lacks():
    assert len(FLORES_200) == len(set(FLORES_200)) == 204
    tokens = {nllb_token(code) for code in FLORES_200}
    assert tokens - set(FAIRSEQ_LANGUAGE_CODES) == {"arb_Latn", "min_Arab"}
    assert set(FAIRSEQ_LANGUAGE_CODES) <= tokens


def test_known_code_is_returned():
    assert check_language("swh_Latn") == "swh_Latn"
    assert check_language("tlh_Latn", known=["tlh_Latn"]) == "tlh_Latn"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("en", "eng_Latn"),
        ("eng_Ltn", "eng_Latn"),
        ("ENG-latn", "eng_Latn"),
        ("swa_Latn", "swh_Latn"),
        ("nqo_Nko", "nqo_Nkoo"),
        ("Toba Batak", "bbc_Latn"),
        ("greek", "ell_Grek"),
        ("", "ace_Arab"),
    ],
)
def test_unknown_code_suggests_the_nearest(typed, meant):
    with pytest.raises(
        ValueError, match=rf"unknown language '{typed}'; did you mean .*{meant}"
    ) as error:
        check_language(typed)
    assert len(str(error.value).split("did you mean")[1].split(",")) == 3


def test_every_language_has_a_name_and_a_script():
    assert tuple(sorted(FLORES_200)) == FLORES_200 and all(map(is_well_formed, FLORES_200))
    assert tuple(NAMES)[:204] == FLORES_200 and all(map(is_well_formed, NAMES))
    assert {code[4:] for code in NAMES} == set(SCRIPTS)
    for code, name in {
        "sat_Olck": "Santali",
        "zho_Hant": "Chinese",
        "kbp_Latn": "Kabiyè",
        "nqo_Nkoo": "N'Ko",
        "uig_Cyrl": "Uyghur",
        "fry_Latn": "Western Frisian",
    }.items():
        assert NAMES[code] == name


def test_what_test_sets_and_encoders_have_beside_flores_is_named():
    sets = [each for task in task_names() for each in load_task(task).datasets.values()]
    assert {code for each in sets for code in each.languages.values()} <= {*NAMES}
    assert {code for theirs in TRAINED.values() for code in _codes(theirs)} <= {*NAMES}
    for code in {*NAMES} - {*FLORES_200}:
        assert check_language(code) == check_code(code) == flores_code(code.upper()) == code


def test_names_are_tidy():
    assert all(name == name.strip() and name for name in [*NAMES.values(), *SCRIPTS.values()])


@pytest.mark.parametrize("code", ["qaa_Latn", "qaz_Cyrl", "qtz_Latn", "qmb_Arab"])
def test_private_codes_are_languages(code):
    assert check_language(code) == code == nllb_token(code) == flores_code(code)
    with pytest.raises(ValueError, match="unknown language"):
        check_language(code, known=["eng_Latn"])


@pytest.mark.parametrize(
    "code", ["qua_Latn", "qzz_Latn", "qaa", "qaa_latn", "qaaa_Latn", "qaa_Latn ", "xaa_Latn"]
)
def test_codes_like_private_ones_are_unknown(code):
    with pytest.raises(ValueError, match="unknown language"):
        check_language(code)


@pytest.mark.parametrize(
    ("code", "meant"),
    [
        ("el", "ell_Grek"),
        ("zh", "zho_Hans"),
        ("ne", "npi_Deva"),
        ("swh", "swh_Latn"),
        ("swa", "swh_Latn"),
        ("kk", "kaz_Cyrl"),
        ("ary_arab", "ary_Arab"),
        ("SWH-latn", "swh_Latn"),
        ("npi_Latn", "npi_Latn"),
        ("nij_Latn", "nij_Latn"),
        ("nij", "nij_Latn"),
        ("nqo", "nqo_Nkoo"),
        ("uig", "uig_Arab"),
        ("urd", "urd_Arab"),
        ("EN", "eng_Latn"),
    ],
)
def test_benchmarks_codes(code, meant):
    assert flores_code(code) == meant


def test_codes_that_say_too_little_or_nothing():
    with pytest.raises(
        ValueError, match="'min' is written in several scripts: choose one of min_Arab, min_Latn"
    ):
        flores_code("min")
    with pytest.raises(ValueError, match="unknown language 'tlh'; did you mean"):
        flores_code("tlh")
    assert set(OTHER_CODES.values()) <= set(FLORES_200) and not {
        code[:3] for code in FLORES_200
    } & set(OTHER_CODES)


@pytest.mark.parametrize(
    "code", ["nij_Latn", "xaa_Latn", "qaa_Latn", "swh_Latn", "tlh_Piqd", "ben_Latn"]
)
def test_texts_may_be_of_a_language_that_flores_lacks(code):
    assert check_code(code) == code


@pytest.mark.parametrize(
    "code", ["swa_Latn", "sat_Beng", "swh_Arab", "nqo_Latn", "nij", "nij-Latn", "en", ""]
)
def test_texts_may_not_be_of_a_language_that_flores_calls_otherwise(code):
    with pytest.raises(ValueError, match="unknown language .*; did you mean"):
        check_code(code)
