import pytest
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from mtllm_engine.data.languages import FLORES_200, check_language, nllb_token


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
    [("en", "eng_Latn"), ("eng_Ltn", "eng_Latn"), ("ENG-latn", "eng_Latn"), ("swa_Latn", "swh_Latn"), ("", "ace_Arab")],
)
def test_unknown_code_suggests_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=rf"unknown language '{typed}'; did you mean .*{meant}") as error:
        check_language(typed)
    assert len(str(error.value).split("did you mean")[1].split(",")) == 3
