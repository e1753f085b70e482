"""Vectors: whatever the order and the batch, those of a padded loop over transformers and PEFT."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import regex
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from mtllm_engine import MTLLM, inference
from mtllm_engine.config import Config
from mtllm_engine.data.batch import Document
from mtllm_engine.languages import nllb_token
from tests.support.adapters import seal, write_run
from tests.support.machine import ROOT
from tests.support.padded import TOLERANCE, Padded, attention_mask, load_llm, mean_pool, pad
from tests.support.recipes import error_of
from tests.support.scripts import SENTENCES
from tests.support.tiny import build_config, build_decoder, build_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 48  # data.max_length
FALLBACK = {"min_Arab": "ind_Latn", "nqo_Nkoo": "bam_Latn"}
SPELLED = "</s> a <pad> b swh_Latn <s> <unk> <|begin_of_text|> sat_Beng"
KINDS = {  # keys of `model`; the teacher is a run
    "bidirectional": {},
    "causal": {"causal": True},
    "without bias": {"projection_bias": False},
    "stage 2": {"teacher": "finetune bidirectional"},
    "causal stage 2": {
        "causal": True,
        "projection_bias": False,
        "teacher": "finetune causal",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models, a run of each of the kinds, and those that two of them learned from."""
    folder = tmp_path_factory.mktemp("inference")
    build_encoder(folder / "encoder", samples=[*itertools.chain(*SENTENCES.values()), SPELLED])
    build_decoder(folder / "decoder", samples=[SPELLED])
    (folder / "encoder" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    lora = {"rank": 8, "alpha": 4.0, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    options = {"objective": {"kind": "finetune", "reader": "llm"}, "lora": lora}
    options |= {"task": {"name": "sib200", "train": f"sib200:{folder}"}, "data": {"train": []}}
    for attention in ("bidirectional", "causal"):
        model = {"causal": attention == "causal"}
        write_run(configure(folder, f"finetune {attention}", model, **options), seed=9)
    for seed, (name, model) in enumerate(KINDS.items()):
        write_run(configure(folder, name, model), seed=seed)
    for kind in ("lines", "sentences"):
        write_run(configure(folder, kind, data={"parts": kind, "max_length": 2 * LONGEST}))
    return folder


def configure(folder: Path, name: str, model: dict | None = None, **sections) -> Config:
    models = {key: str(folder / key) for key in ("encoder", "decoder")} | {"dtype": "float32"}
    models |= model or {}
    if models.get("teacher"):
        models["teacher"] = str(folder / models["teacher"] / "checkpoints" / "latest")
    data = {"train": [str(folder / "none")], "max_length": LONGEST, "pack_documents": 1}
    data |= sections.pop("data", {})
    options = {"run": {"dir": str(folder / name)}, "model": models, "data": data}
    return build_config(folder, **options, languages={"fallback": FALLBACK}, **sections)


@pytest.fixture(scope="module")
def model(folder: Path) -> MTLLM:
    return MTLLM.from_pretrained(folder / "bidirectional")


class Peers:
    """Reads texts as one would with transformers and PEFT, padded, all at once."""

    def __init__(self, config: Config) -> None:
        student = Path(config.run.dir, "checkpoints", "latest")
        saved = load_file(student / "projection.safetensors")
        projection = nn.Linear(*saved["weight"].T.shape, bias="bias" in saved)
        projection.load_state_dict(saved)
        self.llm = peft.PeftModel.from_pretrained(load_llm(config), student, "student")
        if config.model.teacher:
            self.llm.load_adapter(config.model.teacher, "teacher")
        self.padded = Padded(config, self.llm, projection)
        self.config, options = config, {"split_special_tokens": True}
        self.nllb = AutoTokenizer.from_pretrained(config.model.encoder, **options)
        self.llama = AutoTokenizer.from_pretrained(config.model.decoder, **options)

    def student_ids(self, text: str, code: str) -> np.ndarray:
        self.nllb.src_lang = nllb_token(FALLBACK.get(code, code))
        return np.array(self.nllb(text)["input_ids"])

    def teacher_ids(self, text: str, code: str) -> np.ndarray:
        return np.array(self.llama(text)["input_ids"])

    @torch.no_grad()
    def encode(self, texts: Sequence[str], codes: Sequence[str], reader: str) -> np.ndarray:
        read = getattr(self, f"{reader}_ids")
        rows = [cut(text, partial(read, code=code)) for text, code in zip(texts, codes)]
        ids_BL, real_BL = pad(rows)
        if reader == "student":
            return self.pool(self.padded.projected(ids_BL, real_BL), real_BL)
        embedded_BLD = self.llm.get_input_embeddings()(ids_BL)
        if not self.config.model.teacher:
            with self.llm.disable_adapter():
                return self.pool(embedded_BLD, real_BL)
        self.llm.set_adapter("teacher")
        pooled_BD = self.pool(embedded_BLD, real_BL)
        self.llm.set_adapter("student")
        return pooled_BD

    def pool(self, embedded_BLD: torch.Tensor, real_BL: torch.Tensor) -> np.ndarray:
        mask = attention_mask(real_BL, self.config.model.causal)
        options = {"attention_mask": mask, "use_cache": False}
        states_BLD = self.llm(inputs_embeds=embedded_BLD, **options).last_hidden_state
        return mean_pool(states_BLD, real_BL).numpy()

    @torch.no_grad()
    def encode_parts(self, lines: Sequence[Sequence[str]], code: str, kind: str) -> np.ndarray:
        """The vector (1, D) of lines of sentences, each line or sentence read by itself."""
        text = "\n".join(map(" ".join, lines))
        tokens = self.llama(text, return_offsets_mapping=True, add_special_tokens=False)
        pairs = zip(tokens["input_ids"], tokens["offset_mapping"])
        newlines = [token for token, (start, end) in pairs if "\n" in text[start:end]]
        ids, pieces = [], []
        for sentences, between in zip(lines, [*([token] for token in newlines), []], strict=True):
            for part in sentences if kind == "sentences" else [" ".join(sentences)]:
                of_part = self.student_ids(part, code).tolist()
                pieces.append((len(ids), len(ids) + len(of_part)))
                ids += of_part
            ids += between
        parts_Q2 = np.array(pieces, np.int32)
        document = Document(
            key="",
            seed=0,
            student_ids_S=np.array(ids),
            teacher_ids_T=np.zeros(1, np.int32),
            parts_Q2=parts_Q2,
        )
        embedded_BLD = self.padded.interleaved(document)[None]
        return self.pool(embedded_BLD, torch.ones(embedded_BLD.shape[:2]).bool())


def cut(text: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The ids of what is read, by trying all: the most that ends where a word does, or, where words
    end too rarely, a grapheme.
    """
    if len(ids := read(text)) <= LONGEST:
        return ids
    units = (r"\S(?=\s)", r"\X")
    ends = [[match.end() for match in regex.finditer(unit, text)] for unit in units]
    words, graphemes = (
        max((end for end in each if len(read(text[:end])) <= LONGEST), default=0) for each in ends
    )
    return read(text[: words if 2 * words >= graphemes else graphemes])


def assert_close(ours_ND: np.ndarray, theirs_ND: np.ndarray) -> None:
    """To 1e-5 of the largest."""
    assert ours_ND.dtype == np.float32 and ours_ND.shape == theirs_ND.shape
    error, largest = np.abs(ours_ND - theirs_ND).max(), np.abs(theirs_ND).max()
    assert error <= TOLERANCE * largest, f"off by {error} of {largest}"


TEXTS = ["", "a", "the", SPELLED, "the end " * 40, "月の外層は" * 30, " \t", "a\nb", "é" * 3]
TEXTS += [sentences[0] for sentences in SENTENCES.values()]
CODES = ["swh_Latn", "sat_Olck", "min_Arab", *SENTENCES]


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_a_padded_loop(folder: Path, kind: str):
    """The student's and the teacher's, of any language and any text."""
    model, peers = MTLLM.from_pretrained(folder / kind), Peers(configure(folder, kind, KINDS[kind]))
    codes = [CODES[number % len(CODES)] for number in range(len(TEXTS))]
    vectors = {}
    for reader in ("student", "teacher"):
        vectors[reader] = model.encode(TEXTS, codes, reader=reader)
        assert_close(vectors[reader], peers.encode(TEXTS, codes, reader))
    assert np.array_equal(vectors["teacher"], model.encode(TEXTS, reader="teacher"))
    assert model.cut >= 4 + 2  # two texts, three times; of others it depends on who reads


LINES = [["One two."], ["One two.", "Three four?"], ["a", "b"], ["The end.", "Yes."]]


@pytest.mark.parametrize("kind", ["lines", "sentences"])
def test_texts_in_parts_are_read_part_by_part(folder: Path, kind: str):
    model, peers = MTLLM.from_pretrained(folder / kind), Peers(configure(folder, kind))
    documents = [[LINES[0]], LINES[:2], [LINES[3], LINES[1], LINES[0]], [["a"]], [["a"], ["b"]]]
    texts = ["\n".join(map(" ".join, lines)) for lines in documents]
    theirs_ND = np.concatenate([peers.encode_parts(each, "swh_Latn", kind) for each in documents])
    assert_close(model.encode(texts, "swh_Latn"), theirs_ND)
    assert not model.cut
    whole_ND = MTLLM.from_pretrained(folder / "bidirectional").encode(texts, "swh_Latn")
    assert np.abs(whole_ND - theirs_ND)[1:3].max(1).min() > 1e-3


BITS = ["", "a", "the ", "end", " ", "\n", "the end " * 9, *SENTENCES["jpn_Jpan"]]
ANY = st.lists(st.sampled_from([*BITS, *TEXTS]), max_size=4).map("".join)


@settings(max_examples=15)
@given(
    pairs=st.lists(st.tuples(ANY, st.sampled_from(CODES)), min_size=1, max_size=9),
    order=st.randoms(use_true_random=False),
    max_tokens=st.sampled_from([1, 60, 200, 8192]),
    window=st.sampled_from([1, 3, 4096]),
    reader=st.sampled_from(["student", "teacher"]),
)
@example([(text, "swh_Latn") for text in TEXTS], None, 100, 4, "student")
def test_a_text_has_one_vector_whatever_is_read_with_it(
    model: MTLLM, pairs, order, max_tokens, window, reader
):
    alone_ND = np.concatenate([model.encode([text], code, reader=reader) for text, code in pairs])
    places = list(range(len(pairs)))
    if order:
        order.shuffle(places)
    texts, codes = zip(*(pairs[place] for place in places))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "WINDOW", window)
        ours_ND = model.encode(texts, codes, reader=reader, max_tokens=max_tokens)
    assert_close(ours_ND, alone_ND[places])


def test_a_language_is_of_all_texts_or_of_each(model: MTLLM):
    texts = TEXTS[:8]
    of_all_ND = model.encode(texts, language="swh_Latn")
    assert np.array_equal(of_all_ND, model.encode(texts, language=["swh_Latn"] * len(texts)))
    others_ND = model.encode(texts, language=["swh_Latn", "deu_Latn"] * 4)
    assert (np.abs(others_ND - of_all_ND).max(1) > 1e-3).tolist() == [False, True] * 4


def test_every_language_it_names_can_be_read(model: MTLLM):
    """Santali by NLLB's name for it, one that the encoder lacks as its fallback."""
    languages = model.languages
    assert isinstance(languages, tuple) and len(languages) == len({*languages})
    assert {"sat_Olck", *FALLBACK, "eng_Latn", "zho_Hans"} <= {*languages}
    assert not {"sat_Beng", "arb_Latn"} & {*languages}
    assert len(languages) == 202 + len(FALLBACK)
    vectors = dict(zip(languages, model.encode(["the end"] * len(languages), languages)))
    for code, given_code in FALLBACK.items():
        assert_close(vectors.pop(code), vectors[given_code])
    assert len({vector.round(4).tobytes() for vector in vectors.values()}) == len(vectors)


def test_licences_are_those_of_its_models(model: MTLLM):
    assert model.licences == {"encoder": "cc-by-nc-4.0", "decoder": "unknown"}


def test_control_tokens_in_a_text_are_its_characters(folder: Path, model: MTLLM):
    """What is behind `</s>` counts, and what is spelled is no token of its own."""
    peers = Peers(configure(folder, "bidirectional"))
    texts = ["a", "a</s>", "a</s> b", "a<pad>", "a <unk>", "a <s>", "swh_Latn a"]
    texts += ["a<|begin_of_text|>", SPELLED]
    codes = ["deu_Latn"] * len(texts)
    for reader, tokenizer in (("student", peers.nllb), ("teacher", peers.llama)):
        control = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("swh_Latn")}
        ids = [getattr(peers, f"{reader}_ids")(text, "deu_Latn")[1:-1].tolist() for text in texts]
        assert not control.intersection(itertools.chain(*ids))
        vectors_ND = model.encode(texts, codes, reader=reader)
        assert_close(vectors_ND, peers.encode(texts, codes, reader))
        assert len({vector.round(4).tobytes() for vector in vectors_ND}) == len(texts)


def test_normalised_vectors_have_length_1(model: MTLLM):
    vectors_ND = model.encode(TEXTS, "swh_Latn")
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    assert np.abs(norms_N1 - 1).min() > 0.1
    assert_close(model.encode(TEXTS, "swh_Latn", normalize=True), vectors_ND / norms_N1)


def test_no_texts_have_no_vectors(model: MTLLM):
    for language in ("swh_Latn", None, []):
        vectors_ND = model.encode([], language=language)
        assert vectors_ND.shape == (0, 48) and vectors_ND.dtype == np.float32
    assert model.encode((), reader="teacher", normalize=True).shape == (0, 48)


def test_threads_may_read_at_once(model: MTLLM):
    lists = [[*TEXTS[number:], *TEXTS[:number]] * 2 for number in range(8)]
    before, alone = model.cut, [model.encode(texts, "swh_Latn") for texts in lists]
    cut_alone = model.cut - before
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(model.encode, texts, "swh_Latn") for texts in lists]
        for call, expected_ND in zip(calls, alone):
            assert_close(call.result(), expected_ND)
    assert cut_alone and model.cut - before == 2 * cut_alone


@pytest.mark.parametrize("unit", ["the end ", "月の外層は", "a", "a\n", "One. Two. "])
def test_a_megabyte_is_cut_as_a_page_is_and_costs_no_more(folder: Path, unit: str):
    for kind in ("bidirectional", "lines", "sentences"):
        model = MTLLM.from_pretrained(folder / kind)
        page_1D = model.encode([unit * 1000], "jpn_Jpan")
        start_s = time.process_time()
        vectors_ND = model.encode([unit * (1_000_000 // len(unit))], "jpn_Jpan")
        assert time.process_time() - start_s < 0.5
        assert_close(vectors_ND, page_1D)
        assert model.cut == 2


BAD = {  # arguments -> what is said
    "a text alone": (("a", "swh_Latn"), {}, r"texts is a single text; write a list"),
    "no language": ((["a"],), {}, r'say which language .* language="swh_Latn"'),
    "no language of one": ((["a"], [None]), {}, r"say which language"),
    "unknown": ((["a"], "swahili"), {}, r"unknown language 'swahili'; did you mean swh_Latn"),
    "without a token": ((["a"], "arb_Latn"), {}, r"the encoder has no token for arb_Latn"),
    "NLLB's own": ((["a"], "sat_Beng"), {}, r"unknown language 'sat_Beng'; .*sat_Olck"),
    "one of several": ((["a", "b"], ["swh_Latn", "swh"]), {}, r"unknown language 'swh'"),
    "too few": ((["a", "b"], ["swh_Latn"]), {}, r"there are 2 texts and 1 languages"),
    "nothing": ((["a", None], "swh_Latn"), {}, r"texts\[1\] is no text: .*NoneType"),
    "bytes": (([b"a"], "swh_Latn"), {}, r"texts\[0\] is no text: .*bytes"),
    "a surrogate": ((["a", "\ud800"], "swh_Latn"), {}, r"texts\[1\] is not Unicode"),
    "nobody": ((["a"], "swh_Latn"), {"reader": "llm"}, r'"student" or "teacher", not \'llm\''),
    "no room": ((["a"], "swh_Latn"), {"max_tokens": 0}, r"max_tokens must be at least 1, not 0"),
}


@pytest.mark.parametrize("arguments, options, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(model: MTLLM, arguments, options, message):
    assert re.search(message, error_of(lambda: model.encode(*arguments, **options)))


FRESH = """
import json, sys
import mtllm_engine
lazy = "torch" not in sys.modules
from mtllm_engine import MTLLM
imported = [name for name in sys.argv[2:] if name in sys.modules]
vectors = MTLLM.from_pretrained(sys.argv[1]).encode(["the end", ""], language="swh_Latn")
loaded = [name for name in sys.argv[2:] if name in sys.modules]
print(json.dumps([lazy, imported, loaded, vectors.tolist()]))
"""


def test_a_fresh_process_loads_nothing_that_only_trains(folder: Path, model: MTLLM):
    """And no test set up what it needs."""
    heavy = ["deepspeed", "matplotlib", "tensorboard", "webdataset"]
    heavy += ["torch.utils.tensorboard", "mtllm_engine.training.report", "mtllm_engine.evaluation"]
    command = [sys.executable, "-c", FRESH, str(folder / "bidirectional"), *heavy]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lazy, imported, loaded, vectors = json.loads(done.stdout)
    assert (lazy, imported, loaded) == (True, [], [])
    assert_close(np.array(vectors, np.float32), model.encode(["the end", ""], "swh_Latn"))


def test_the_frozen_weights_have_the_dtype_that_is_asked_for(folder: Path, model: MTLLM):
    """As in training where none is."""
    write_run(configure(folder, "bfloat16", {"dtype": "bfloat16"}))
    expected_ND = model.encode(TEXTS, "swh_Latn")
    asked = MTLLM.from_pretrained(folder / "bfloat16", dtype="float32")
    assert_close(asked.encode(TEXTS, "swh_Latn"), expected_ND)
    plain = MTLLM.from_pretrained(folder / "bfloat16")
    assert plain.stack.decoder.embedding.weight.dtype == torch.bfloat16
    rounded_ND = plain.encode(TEXTS, "swh_Latn")
    error = np.abs(rounded_ND - expected_ND).max() / np.abs(expected_ND).max()
    assert rounded_ND.dtype == np.float32 and 1e-4 < error < 0.1


def test_models_that_moved_are_named_and_others_are_refused(
    folder: Path, model: MTLLM, tmp_path: Path
):
    run = shutil.copytree(folder / "bidirectional", tmp_path / "run", symlinks=True)
    text = (run / "config.toml").read_text()
    for key in ("encoder", "decoder"):
        text = text.replace(str(folder / key), str(tmp_path / "gone" / key))
    (run / "config.toml").write_text(text)
    assert "gone" in error_of(lambda: MTLLM.from_pretrained(run))
    moved = {key: str(folder / key) for key in ("encoder", "decoder")}
    found = MTLLM.from_pretrained(run, **moved)
    assert np.array_equal(found.encode(TEXTS, "swh_Latn"), model.encode(TEXTS, "swh_Latn"))
    for key in moved:
        changed = shutil.copytree(folder / key, tmp_path / key)
        edit(changed / "model.safetensors", lambda name, tensor: tensor.mul_(1 + 1e-3))
        message = error_of(partial(MTLLM.from_pretrained, run, **moved | {key: str(changed)}))
        assert f"was trained with another model.{key} than {changed}" in message
    swapped = {"encoder": moved["decoder"], "decoder": moved["decoder"]}
    assert "model.encoder" in error_of(lambda: MTLLM.from_pretrained(run, **swapped))


def edit(path: Path, change: Callable[[str, torch.Tensor], object]) -> None:
    """Changes the tensors of a file in their place."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        change(name, tensor)
    save_file(tensors, path, {"format": "pt"})


def spoil_last(part: str) -> Callable[[str, torch.Tensor], None]:
    def change(name: str, tensor: torch.Tensor) -> None:
        if name.endswith(part):
            tensor.view(-1)[-1] = torch.nan

    return change


@pytest.mark.parametrize(
    "path, part",
    [
        ("projection.safetensors", "weight"),
        ("projection.safetensors", "bias"),
        ("adapter_model.safetensors", "layers.2.mlp.down_proj.lora_B.weight"),
        ("teacher", "layers.1.self_attn.q_proj.lora_A.weight"),
        ("decoder", "model.norm.weight"),
        ("decoder", "layers.0.mlp.up_proj.weight"),
        ("encoder", "encoder.layers.1.fc1.weight"),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(
    folder: Path, tmp_path: Path, path: str, part: str
):
    for name in ("encoder", "decoder", "stage 2", "finetune bidirectional"):
        shutil.copytree(folder / name, tmp_path / name, symlinks=True)
    if path in ("encoder", "decoder"):
        edit(tmp_path / path / "model.safetensors", spoil_last(part))
    write_run(configure(tmp_path, "finetune bidirectional", KINDS["stage 2"]))
    config = configure(tmp_path, "stage 2", {"teacher": "finetune bidirectional"})
    saved = write_run(config)
    checkpoint = Path(config.model.teacher).resolve() if path == "teacher" else saved
    if path not in ("encoder", "decoder"):
        file = checkpoint / (path if path != "teacher" else "adapter_model.safetensors")
        edit(file, spoil_last(part))
        record = json.loads((checkpoint / "state.json").read_text())
        record.pop("sha256")
        seal(checkpoint, record)
    message = error_of(lambda: MTLLM.from_pretrained(tmp_path / "stage 2"))
    assert part in message and "NaN or infinite" in message


@pytest.mark.parametrize("name", ["adapter_model", "projection"])
def test_a_damaged_or_half_copied_checkpoint_is_refused(folder: Path, tmp_path: Path, name: str):
    run = shutil.copytree(folder / "bidirectional", tmp_path / "run", symlinks=True)
    path = run / "checkpoints" / "latest" / f"{name}.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        assert f"{name}.safetensors" in error_of(lambda: MTLLM.from_pretrained(run))
    path.unlink()
    assert f"{name}.safetensors" in error_of(lambda: MTLLM.from_pretrained(run))
