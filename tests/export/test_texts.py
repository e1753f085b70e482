"""The code that travels makes the tokens of every family of encoders that ours makes."""

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from transformers import AutoTokenizer

from mtllm_engine.data.annotations import NO_ANNOTATIONS, Annotations
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.export.clients import Client
from mtllm_engine.export.folder import CODE, languages_of
from mtllm_engine.export.models import copy_tokenizer, write_json
from tests.support.exported import AWKWARD
from tests.support.pieces import KINDS, build_tokenizers
from tests.support.scripts import SENTENCES
from tests.support.tiny import build_config, build_decoder, texts

TEXTS = [*AWKWARD, *texts(4, seed=2), *(" \n".join(pair) for pair in SENTENCES.values())]
TEXTS += ["[CLS] a [SEP] b", "<mask> </s>__sw__ sw_KE", "  ﬁve… Ünï  "]
PAIRS = [(text[:90], "and what follows") for text in TEXTS]
READINGS = [  # of parts, truncation and the encoder's prefix
    ("whole", "aligned", ""),
    ("whole", "independent", "query: "),
    ("lines", "aligned", "passage: "),
    ("sentences", "aligned", ""),
]


@pytest.fixture(scope="module")
def land(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("land")
    build_decoder(folder / "decoder")
    return folder


@pytest.fixture(scope="module")
def sources(land) -> dict[str, Path]:
    """Each kind's own folder; beside it lies, in `NAME-out/encoder`, what is exported of it."""
    sources = build_tokenizers(land)
    for source in sources.values():
        out = exported(source) / "encoder"
        out.mkdir(parents=True)
        copy_tokenizer(source, out)
        shutil.copyfile(source / "config.json", out / "config.json")
        write_json(exported(source) / "config.json", {"model_type": "mtllm"})
    return sources


def exported(source: Path) -> Path:
    return source.with_name(f"{source.name}-out")


@pytest.fixture(scope="module")
def travelled(land) -> ModuleType:
    """What a folder carries, as it is imported there: by its own, without our package."""
    package = land / "travelled"
    package.mkdir()
    for path in CODE:
        shutil.copyfile(path, package / path.name)
    sys.path.insert(0, str(land))
    try:
        yield importlib.import_module("travelled.texts_mtllm")
    finally:
        sys.path.remove(str(land))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens(kind, land, sources, travelled):
    encoder = travelled.open_tokenizer(str(exported(sources[kind])), subfolder="encoder")
    llm = travelled.open_tokenizer(str(land / "decoder"))
    for parts, truncation, prefix in READINGS:
        about = {"encoder": str(sources[kind]), "encoder_prefix": prefix}
        config = build_config(land, model=about, data={"parts": parts, "max_length": 40})
        options = {"max_length": 40, "truncation": truncation, "parts": parts}
        said = SimpleNamespace(**options, **languages_of(config), default_language="")
        models = (about["encoder"], land / "decoder")
        ours = PairTokenizer(*models, **options, encoder_prefix=prefix, reader="stack")
        for language in ("rus_Cyrl", "eng_Latn"):
            side = travelled.student_side(said, encoder, llm, language)
            for text in TEXTS:
                assert_same(side.read(text), ours.example(text, language, NO_ANNOTATIONS)[0])
            for first, second in PAIRS:
                annotations = Annotations(cut=(0, len(first)))
                reading, _ = ours.example(f"{first}\n{second}", language, annotations)
                assert_same(side.read(first, f"\n{second}"), reading)


def assert_same(read, reading) -> None:
    ids, part_ids = read
    assert ids == reading.ids_S.tolist()
    parts = [[0, len(ids)]] if reading.parts_Q2 is None else reading.parts_Q2.tolist()
    expected = [0] * len(ids)
    for number, (start, end) in enumerate(parts, 1):
        expected[start:end] = [number] * (end - start)
    assert part_ids == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_cards_program_makes_the_same_tokens(kind, land, sources):
    """Of texts that spell no control token and fit, told the language as its lines say."""
    source = sources[kind]
    config = build_config(land, model={"encoder": str(source), "encoder_prefix": "query: "})
    words = Client.of(config).words
    call = f"    return tokenizer({words['text']})"
    scope = {"tokenizer": AutoTokenizer.from_pretrained(exported(source) / "encoder")}
    exec(f"def read(text{words['language']}):\n{words['tell']}{call}", scope)
    models = (source, land / "decoder")
    ours = PairTokenizer(*models, max_length=4000, encoder_prefix="query: ", reader="stack")
    named = [words["example"].strip("', ")] * bool(words["language"])
    language = "arb_Arab" if kind == "mbart-25" else "swh_Latn"
    for text in map(" ".join, SENTENCES.values()):
        read = scope["read"](text, *named)["input_ids"]
        assert read == ours.example(text, language, NO_ANNOTATIONS)[0].ids_S.tolist()
    if named:
        with pytest.raises(AssertionError, match="swahili"):
            scope["read"]("a", "swahili")
