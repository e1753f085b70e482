"""Runs on encoders of other families: one is told no language and reads every text behind a prefix,
one has a tokenizer of SentencePiece's alone.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mtllm_engine import files
from mtllm_engine.config import Config
from mtllm_engine.inference import MTLLM
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.show import show
from mtllm_engine.train import train
from mtllm_engine.training.checkpoint import fingerprint_of, latest, teacher_identity
from mtllm_engine.training.origins import check_origins
from tests.support.encoders import build_padded_encoder
from tests.support.pieces import build_m2m_100, train_pieces
from tests.support.stages import ALONE
from tests.support.tiny import build_config, build_corpus, build_decoder, build_encoder, texts

PREFIX = "passage: "
LINES = texts(5, seed=3, longest=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("e5")
    build_padded_encoder(folder / "encoder", "e5-small", max_position_embeddings=160)
    build_decoder(folder / "decoder")
    build_corpus(folder / "train", 24)
    train(configured(folder), ALONE)
    return folder


def configured(folder: Path, prefix: str = PREFIX, **sections) -> Config:
    model = {"encoder_prefix": prefix} | sections.pop("model", {})
    keys = {"optim": {"steps": 2, "lr": 1e-3}, "zero": {"stage": 0}, "data": {"max_length": 150}}
    return build_config(folder, model=model, **keys | {"memory": {"max_tokens": 400}} | sections)


@pytest.fixture(scope="module")
def model(folder) -> MTLLM:
    return MTLLM.from_pretrained(folder / "run", device="cpu")


def test_a_language_may_be_said_and_changes_nothing(model):
    vectors_ND = model.encode(LINES)
    assert np.isfinite(vectors_ND).all()
    for language in ("swh_Latn", "ibo_Latn", ["tlh_Piqd"] * len(LINES)):
        assert np.array_equal(model.encode(LINES, language=language), vectors_ND)
    assert "swh_Latn" in model.languages and "ibo_Latn" not in model.languages
    with pytest.raises(ValueError, match="unknown language 'swahili'; did you mean swh_Latn"):
        model.encode(LINES, language="swahili")


def test_vectors_are_those_of_texts_with_the_prefix(folder, model):
    """The same weights, read without one: what the prefix says must be written out then."""
    state = folder / "run" / "checkpoints" / "latest"
    bare = MTLLM.from_pretrained(state, device="cpu")
    side = bare._sides["student"].tokenizer
    side.encoder_prefix = ""
    side._students.clear()
    spelled_ND = bare.encode([PREFIX + line for line in LINES])
    assert np.allclose(model.encode(LINES), spelled_ND, rtol=1e-5, atol=1e-6)
    assert not np.allclose(model.encode(LINES), bare.encode(LINES), rtol=1e-3)


def test_another_prefix_is_another_run(folder):
    with pytest.raises(ValueError, match='model.encoder_prefix was "passage: " and is "query: "'):
        train(configured(folder, "query: "), ALONE)
    origin = str(folder / "run" / "checkpoints" / "latest")
    check_origins(configured(folder, model={"init_from": [origin]}))
    with pytest.raises(ValueError, match="another model.encoder_prefix than 'query: '; set it to"):
        check_origins(configured(folder, "query: ", model={"init_from": [origin]}))


def test_a_prefix_leaves_room_for_a_text(folder):
    config = configured(folder, "a b c " * 60)
    with pytest.raises(ValueError, match="model.encoder_prefix takes .* no room for a text"):
        build_tokenizer(config, build_stack(config)[0])


def test_a_fallback_is_for_encoders_that_are_told(folder):
    config = configured(folder, languages={"fallback": {"bbc_Latn": "ind_Latn"}})
    known = build_tokenizer(config, build_stack(config)[0]).languages
    assert "bbc_Latn" not in known.readable(config.languages.fallback)


def test_stored_teacher_states_are_of_the_same_prefix(folder):
    """It leaves the teacher fewer of a text's characters."""
    said = [teacher_identity(configured(folder, prefix)) for prefix in (PREFIX, "query: ")]
    assert {key for key in said[0] if said[0][key] != said[1][key]} == {"model.encoder_prefix"}


def test_a_checkpoint_from_before_prefixes_had_none(folder, tmp_path):
    before = tmp_path / "before"
    shutil.copytree(folder / "run" / "checkpoints" / "latest", before)
    record = json.loads((before / "state.json").read_text())
    del record["sha256"], record["identity"]["model.encoder_prefix"]
    (before / "state.json").write_bytes(files.sealed(record))
    check_origins(configured(folder, "", model={"init_from": [str(before)]}))
    with pytest.raises(ValueError, match="another model.encoder_prefix than 'passage: '; set it"):
        check_origins(configured(folder, model={"init_from": [str(before)]}))


def test_show_says_what_it_reads(folder):
    shown = show(str(folder / "run"))
    assert "texts       read whole behind 'passage: ', up to 150 tokens" in shown
    assert "languages   99: afr_Latn, " in shown


@pytest.fixture(scope="module")
def m2m_100(folder, tmp_path_factory) -> Path:
    """A run on such an encoder, with the other's LLM and corpus."""
    here = tmp_path_factory.mktemp("m2m-100")
    tokenizer = build_m2m_100(here, train_pieces(here / "bpe", texts(200), "bpe", size=400))
    encoder = build_encoder(here / "encoder", vocab_size=len(tokenizer.encoder) + 108)
    for path in encoder.glob("tokenizer*"):
        path.unlink()
    tokenizer.save_pretrained(encoder)
    places = {"decoder": str(folder / "decoder")}
    data = {"train": str(folder / "train"), "max_length": 80}
    train(build_config(here, model=places, data=data, optim={"steps": 2}, zero={"stage": 0}), ALONE)
    return here


def test_a_tokenizer_of_pieces_alone_is_as_good_as_another(m2m_100):
    model = MTLLM.from_pretrained(m2m_100 / "run", device="cpu")
    assert len(model.languages) == 100
    swahili_ND, french_ND = (model.encode(LINES, each) for each in ("swh_Latn", "fra_Latn"))
    assert np.isfinite(swahili_ND).all() and not np.allclose(swahili_ND, french_ND, rtol=1e-3)
    each_ND = np.concatenate([model.encode([line], "swh_Latn") for line in LINES])
    assert np.allclose(swahili_ND, each_ND, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="the encoder has no token for zho_Hant; the nearest are"):
        model.encode(LINES, "zho_Hant")


def test_its_vocabulary_belongs_to_the_encoder(m2m_100, folder):
    model = {"init_from": [str(latest(m2m_100 / "run" / "checkpoints"))]}
    config = build_config(m2m_100, model=model | {"decoder": str(folder / "decoder")})
    check_origins(config)
    vocabulary = m2m_100 / "encoder" / "vocab.json"
    ids = json.loads(vocabulary.read_text())
    ids["\u2581a"], ids["\u2581the"] = ids["\u2581the"], ids["\u2581a"]
    vocabulary.write_text(json.dumps(ids))
    fingerprint_of.cache_clear()
    with pytest.raises(ValueError, match="was trained with another model.encoder than"):
        check_origins(config)
