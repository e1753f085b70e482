"""The self-contained folder: what transformers makes of it where our package is not, and what ours
does; what is in it, and what is refused.
"""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from mtllm_engine import MTLLM, files
from mtllm_engine.cli import main
from mtllm_engine.export import export, seal, streaming
from mtllm_engine.languages import FLORES_200
from mtllm_engine.model.tensors import TensorFiles
from mtllm_engine.training.trained import find_trained
from tests.support.exported import AWKWARD, run_without_us, write_stack, write_task
from tests.support.tiny import build_decoder, build_encoder, texts

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "plain": {},
    "causal": {"bias": False, "model": {"causal": True}},
    "taught": {"has_task": True, "languages": {"fallback": {"min_Arab": "ind_Latn"}}},
    "taught-causal": {"has_task": True, "bias": False, "model": {"causal": True}},
    "lines": {"data": {"parts": "lines"}},
    "sentences": {"bias": False, "model": {"causal": True}, "data": {"parts": "sentences"}},
    "independent": {"data": {"truncation": "independent"}},
}
TEXTS = [*AWKWARD, *texts(8, seed=3)]
PAIRS = [
    ("a premise of a few words " * 9, "and what follows"),
    ("short", "shorter"),
    ("", "x " * 20),
]
READ = """
from transformers import AutoModel

def said(ask):
    try:
        return str(ask())
    except (ValueError, NotImplementedError) as error:
        return str(error)

for name, job in jobs["cases"].items():
    model = AutoModel.from_pretrained(job["folder"], trust_remote_code=True)
    for key, options in job["asked"].items():
        results[f"{name}/{key}"] = model.encode(**options)
    for key, options in job["classified"].items():
        results[f"{name}/{key}"] = model.classify(**options).probabilities
    for key, (method, options) in job["refused"].items():
        results[f"{name}/{key}"] = said(lambda: getattr(model, method)(**options))
    # What tokenize gives, forward takes, wherever the padding stands.
    batch = model.tokenize(["one two three.\\nFour", "five"], "swh_Latn")
    results[f"{name}/forward"] = model(**batch).pooler_output.detach().numpy()
    turned = {key: torch.stack([each[0], each[1].roll((each[1] == 0).sum().item())])
              for key, each in batch.items() if key != "part_ids"}
    if model.config.parts == "whole":
        results[f"{name}/left"] = model(**turned).pooler_output.detach().numpy()
"""


@pytest.fixture(scope="module")
def land(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("land")
    build_encoder(folder / "encoder")
    build_decoder(folder / "decoder")
    for path in folder.glob("*/*config.json"):
        said = json.loads(path.read_text()) | {"_name_or_path": str(folder)}
        path.write_text(json.dumps(said))
    (folder / "train").mkdir()
    return folder


@pytest.fixture(scope="module")
def stacks(land) -> dict[str, Path]:
    return {
        name: write_stack(land, name, seed=number, **case)
        for number, (name, case) in enumerate(CASES.items())
    }


@pytest.fixture(scope="module")
def exported(land, stacks) -> dict[str, Path]:
    tasks = {"topic": write_task(land / "topic", 3), "nli": write_task(land / "two", 3, seed=6)}
    return {
        name: export(stack, land / f"{name}-out", tasks=tasks if name == "plain" else None)
        for name, stack in stacks.items()
    }


def asked_of(name: str) -> dict[str, dict]:
    languages = ["swh_Latn", "sat_Olck", "zho_Hans"]
    mixed = [languages[number % 3] for number in range(len(TEXTS))]
    asked = {
        "mixed": {"texts": TEXTS, "language": mixed},
        "alone": {"texts": TEXTS[:1], "language": "swh_Latn"},
        "teacher": {"texts": TEXTS, "reader": "teacher"},
        "normal": {"texts": TEXTS[:3], "language": "swh_Latn", "normalize": True},
    }
    if name == "plain":
        # NLLB's vocabulary lacks these two.
        known = [code for code in FLORES_200 if code not in ("arb_Latn", "min_Arab")]
        asked["every"] = {"texts": ["a text"] * len(known), "language": known}
        asked["nothing"] = {"texts": [], "language": "swh_Latn"}
    if name == "taught":
        asked["fallback"] = {"texts": TEXTS[:2], "language": "min_Arab"}
    return asked


def classified_of(name: str) -> dict[str, dict]:
    shared = {"texts": [*TEXTS, *PAIRS], "language": "swh_Latn"}
    tasks = {"plain": ["topic", "nli"], "taught": [""]}.get(name, [])
    return {f"task {task}": shared | {"task": task} for task in tasks}


REFUSED = {
    "missing": ("encode", {"texts": ["a"]}),
    "unknown": ("encode", {"texts": ["a"], "language": "swh_Latin"}),
    "unread": ("encode", {"texts": ["a"], "language": "min_Arab"}),
    "several": ("encode", {"texts": ["a", "b"], "language": ["swh_Latn"]}),
    "one": ("encode", {"texts": "a", "language": "swh_Latn"}),
    "reader": ("encode", {"texts": ["a"], "reader": "LLM"}),
    "half": ("encode", {"texts": ["a\udc80"], "language": "swh_Latn"}),
    "task": ("classify", {"texts": ["a"], "language": "swh_Latn", "task": "x"}),
    "which": ("classify", {"texts": ["a"], "language": "swh_Latn"}),
    "pair": ("classify", {"texts": [["a", "b " * 99]], "language": "swh_Latn", "task": "nli"}),
    "save": ("save_pretrained", {"save_directory": "x"}),
}
LINES = {
    "missing": 'say the language of the texts, such as language="swh_Latn"',
    "unknown": "unknown language 'swh_Latin'; did you mean swh_Latn,",
    "unread": "unknown language 'min_Arab'; did you mean min_Latn,",
    "several": "2 texts, and languages of 1",
    "one": "texts is one text; write a list: [text]",
    "reader": 'reader must be "student" or "teacher", not \'LLM\'',
    "half": "a text has surrogates",
    "task": "there is no classification task 'x'; this model has topic (classification), nli",
    "which": "there is no classification task ''",
    "pair": "the second text of a pair needs more than 64 tokens",
    "save": "copy the folder",
}


def ours(model: MTLLM, name: str) -> dict[str, np.ndarray]:
    vectors = {key: model.encode(**options) for key, options in asked_of(name).items()}
    answers = {
        key: model.classify(**options).probabilities for key, options in classified_of(name).items()
    }
    return vectors | answers


@pytest.fixture(scope="module")
def older(land, exported) -> Path:
    """As one was written when every encoder was NLLB's."""
    folder = land / "older"
    shutil.copytree(exported["taught"], folder)
    settings = json.loads((folder / "config.json").read_text())
    for key in ("encoder_prefix", "language_tokens", "language_last"):
        del settings[key]
    (folder / "config.json").write_text(json.dumps(settings))
    record = json.loads((folder / "mtllm.json").read_text())
    del record["reads"]["model.encoder_prefix"], record["about"]["encoder_class"]
    kept = {key: value for key, value in record.items() if key not in ("sha256", "files")}
    seal(folder, "mtllm.json", kept)
    return folder


@pytest.fixture(scope="module")
def read_elsewhere(land, stacks, exported, older) -> dict[str, np.ndarray]:
    """What transformers makes of every folder, in a process without our package."""
    cases = {
        name: {
            "folder": str(folder),
            "asked": asked_of(name),
            "classified": classified_of(name),
            "refused": REFUSED if name == "plain" else {},
        }
        for name, folder in exported.items()
    }
    merged = {"teacher": ("encode", {"texts": ["a"], "reader": "teacher"})}
    asked = {"mixed": asked_of("merged")["mixed"]}
    job = {"folder": str(land / "merged"), "asked": asked, "classified": {}, "refused": merged}
    export(stacks["taught"], land / "merged", merge=True, default_language="swh_Latn")
    cases["merged"] = job
    # As the hub's client keeps what it fetched.
    model = land / "hub" / "hub" / "models--own--stack"
    shutil.copytree(exported["lines"], model / "snapshots" / f"{1:040x}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(f"{1:040x}")
    cases["hub"] = cases["lines"] | {"folder": "own/stack"}
    cases["older"] = cases["taught"] | {"folder": str(older)}
    return run_without_us(READ, land, cases=cases)


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_gives_our_vectors_and_answers(name, stacks, land, read_elsewhere):
    model = MTLLM.from_pretrained(stacks[name])
    if name == "plain":
        model.add_task("topic", land / "topic")
        model.add_task("nli", land / "two")
    expected = ours(model, name)
    assert len({row.tobytes() for row in expected["mixed"].round(3)}) > 10
    for key, array in expected.items():
        theirs = read_elsewhere[f"{name}/{key}"]
        assert theirs.dtype == np.float32 and theirs.shape == array.shape
        if array.size:
            assert np.abs(theirs - array).max() <= 1e-5 * np.abs(array).max(), key


@pytest.mark.parametrize("name", CASES)
def test_we_read_the_folder_as_we_read_what_was_trained(name, stacks, exported):
    asked = {key: each for key, each in asked_of(name).items() if key != "every"}
    before, after = (MTLLM.from_pretrained(each[name]) for each in (stacks, exported))
    for options in asked.values():
        assert np.array_equal(before.encode(**options), after.encode(**options))
    assert after.languages == before.languages
    trained = after.trained
    assert trained.is_exported and not trained.is_merged
    if name == "taught":
        texts = classified_of(name)["task "]
        assert np.array_equal(*(each.classify(**texts).probabilities for each in (before, after)))
    if name == "plain":
        assert list(after.tasks) == ["topic", "nli"]


@pytest.mark.parametrize("name", REFUSED)
def test_transformers_users_get_a_clear_line(name, read_elsewhere):
    line = str(read_elsewhere[f"plain/{name}"])
    assert line.startswith(LINES[name]) and "\n" not in line


def test_an_older_folder_is_read_as_it_was(land, older, exported, read_elsewhere):
    before, after = (MTLLM.from_pretrained(each) for each in (exported["taught"], older))
    for key, options in asked_of("taught").items():
        assert np.array_equal(read_elsewhere[f"older/{key}"], read_elsewhere[f"taught/{key}"])
        assert np.array_equal(before.encode(**options), after.encode(**options))
    again = export(older, land / "older-again")
    both = [(each / "config.json").read_text() for each in (again, exported["taught"])]
    assert both[0] == both[1]


def test_a_hub_id_is_opened_as_a_folder_is(read_elsewhere):
    for key in ("mixed", "teacher"):
        assert np.array_equal(read_elsewhere[f"hub/{key}"], read_elsewhere[f"lines/{key}"])


def test_what_tokenize_gives_forward_takes(stacks, read_elsewhere):
    for name in CASES:
        vectors = MTLLM.from_pretrained(stacks[name]).encode(
            ["one two three.\nFour", "five"], "swh_Latn"
        )
        for key in ("forward", "left"):
            if f"{name}/{key}" in read_elsewhere:
                np.testing.assert_allclose(
                    read_elsewhere[f"{name}/{key}"], vectors, atol=2e-5, rtol=1e-5
                )


def test_merged_adapters_leave_the_vectors_where_they_were(land, stacks, read_elsewhere):
    before = MTLLM.from_pretrained(stacks["taught"])
    after = MTLLM.from_pretrained(land / "merged")
    options = asked_of("merged")["mixed"]
    expected = before.encode(**options)
    for vectors in (after.encode(**options), read_elsewhere["merged/mixed"]):
        assert 0 < np.abs(vectors - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.array_equal(after.encode(TEXTS[:1]), after.encode(TEXTS[:1], "swh_Latn"))  # default
    scores = [each.classify(TEXTS, "swh_Latn").probabilities for each in (before, after)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    assert "no longer there" in str(read_elsewhere["merged/teacher"])
    settings = json.loads((land / "merged" / "config.json").read_text())
    assert settings["merged"] and settings["teacher"] == ""
    assert not (land / "merged" / "teacher").exists()
    names = {path.name for path in (land / "merged" / "student").iterdir()}
    assert names == {"projection.safetensors", "head.safetensors"}
    card = (land / "merged" / "README.md").read_text()
    assert "100 sentences by " in card and "% of their length" in card
    assert after.trained.is_merged
    with pytest.raises(ValueError, match="the adapters are merged into the LLM's weights"):
        after.encode(TEXTS[:1], reader="teacher")
    for options in ({"merge": True}, {"format": "adapters"}):
        with pytest.raises(ValueError, match="is merged: its adapters are in the LLM's weights"):
            export(land / "merged", land / "again", **options)


def test_added_tasks_answer_beside_merged_adapters(land, stacks, exported):
    tasks = {task: exported["plain"] / "tasks" / task for task in ("topic", "nli")}
    out = export(stacks["plain"], land / "merged tasks", merge=True, tasks=tasks)
    before, after = map(MTLLM.from_pretrained, (stacks["plain"], out))
    for task, folder in tasks.items():
        before.add_task(task, folder)
        options = {"texts": TEXTS, "language": "swh_Latn", "task": task}
        scores = [each.classify(**options).probabilities for each in (before, after)]
        np.testing.assert_allclose(*scores, atol=1e-5)


def test_the_models_are_what_they_were(land, exported):
    folder = exported["plain"]
    llm = load_file(land / "decoder" / "model.safetensors")
    copied = load_file(folder / "llm" / "model.safetensors")
    assert llm.keys() == copied.keys() and "lm_head.weight" in llm
    assert all(torch.equal(llm[name], copied[name]) for name in llm)
    encoder = M2M100Encoder.from_pretrained(folder / "encoder", output_loading_info=True)
    loaded, report = encoder
    assert not report["missing_keys"] and not report["unexpected_keys"]
    whole = load_file(land / "encoder" / "model.safetensors")
    named = {f"model.encoder.{name}": each for name, each in loaded.state_dict().items()}
    shared = {name: each for name, each in named.items() if name in whole}
    assert len(shared) == len(named) - 1  # the embedding, which the decoder shares
    assert all(torch.equal(whole[name], each) for name, each in shared.items())
    for name, is_causal in (("plain", False), ("causal", True)):
        config = json.loads((exported[name] / "llm" / "config.json").read_text())
        assert config.get("is_causal", True) == is_causal
    for side in ("encoder", "llm"):
        tokenizer = AutoTokenizer.from_pretrained(folder / side)
        specials = set(tokenizer.all_special_ids)
        spelled = tokenizer(" ".join(tokenizer.all_special_tokens), add_special_tokens=False)
        assert spelled["input_ids"] and not specials & set(spelled["input_ids"])


def test_what_was_trained_is_stored_in_fp32_by_our_names(stacks, exported):
    for name, parts in (("plain", ["student"]), ("taught", ["student", "teacher"])):
        for part in parts:
            source = (
                stacks[name] if part == "student" else Path(f"{stacks[name].parents[1]}-teacher")
            )
            for path in sorted(source.glob("*.safetensors")):
                before, after = load_file(path), load_file(exported[name] / part / path.name)
                assert before.keys() == after.keys()
                assert all(torch.equal(before[key], after[key]) for key in before)
    assert not (exported["plain"] / "teacher").exists()


def test_the_record_names_every_file_and_a_damaged_one_is_refused(land, exported):
    folder = land / "copy"
    shutil.copytree(exported["taught"], folder)
    written = json.loads((folder / "mtllm.json").read_text())["files"]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written.keys() == there - {"mtllm.json"}
    for name, about in written.items():
        assert files.sha256_of(folder / name) == about["sha256"]
    path = folder / "student" / "projection.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="projection.safetensors is damaged"):
        find_trained(folder)
    path.unlink()
    with pytest.raises(ValueError, match="student/projection.safetensors is missing"):
        find_trained(folder)


def test_a_download_has_what_we_read_and_the_card_may_be_rewritten(land, exported):
    folder = land / "download"
    shutil.copytree(exported["plain"], folder, ignore=shutil.ignore_patterns("*.py"))
    (folder / "README.md").write_text("# Mine\n")
    assert find_trained(folder).tasks.keys() == {"topic", "nli"}


def test_nothing_says_where_things_lay(land, exported):
    for folder in exported.values():
        for path in folder.rglob("*"):
            if path.suffix in (".json", ".md", ".py"):
                assert str(land) not in path.read_text(), path


def test_an_exported_folder_is_exported_again(land, exported):
    out = export(exported["taught"], land / "again", dtype="bfloat16", default_language="zul_Latn")
    again, first = find_trained(out), find_trained(exported["taught"])
    assert again.config.model.dtype == "bfloat16" and again.task == first.task
    assert again.record["about"] == first.record["about"]
    assert again.record["identity"] == first.record["identity"]
    for side in ("encoder", "llm"):
        tensors = load_file(out / side / "model.safetensors")
        assert {each.dtype for each in tensors.values()} == {torch.bfloat16}
        assert json.loads((out / side / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(out / "student" / "projection.safetensors")["weight"].dtype == torch.float32
    vectors = MTLLM.from_pretrained(out).encode(TEXTS)
    expected = MTLLM.from_pretrained(exported["taught"]).encode(TEXTS, "zul_Latn")
    assert 0 < np.abs(vectors - expected).max() < 0.1 * np.abs(expected).max()


def test_no_tensor_is_held_whole(land, stacks, monkeypatch):
    largest = max(
        each.numel() for each in load_file(land / "decoder" / "model.safetensors").values()
    )
    monkeypatch.setattr(streaming, "PIECE", 1000)
    held = most = 0
    read = TensorFiles.read

    def counting(self, name, start, stop):
        nonlocal held, most
        piece = read(self, name, start, stop).clone()
        held, most = held + piece.numel(), max(most, held + piece.numel())
        weakref.finalize(piece, release, piece.numel())
        return piece

    def release(count):
        nonlocal held
        held -= count

    monkeypatch.setattr(TensorFiles, "read", counting)
    monkeypatch.setattr("mtllm_engine.export.folder._moved", lambda *_: {"mean": 0, "largest": 0})
    export(stacks["taught"], land / "pieces", merge=True)
    assert 1000 <= most < largest


WRONG = {
    "there already": ({"out": "encoder"}, "is there already; name a new folder"),
    "format": ({"format": "onnx"}, "there is no format 'onnx'; there are folder, adapters"),
    "dtype": ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, not 'int8'"),
    "merged adapters": ({"format": "adapters", "merge": True}, "--merge is for --format folder"),
    "language": ({"default_language": "arb_Latn"}, "the encoder has no token for arb_Latn"),
    "no language": ({"default_language": "swahili"}, "did you mean swh_Latn"),
    "repository": ({"push": "a/b/c"}, "--push a/b/c: "),
    "no head": ({"tasks": {"x": "plain/checkpoints/one"}}, "has no adapters with a head"),
    "task's name": ({"tasks": {"a b": "topic"}}, "must be letters, digits, - and _"),
    "no stack": (
        {"name": "topic", "encoder": "encoder", "decoder": "decoder"},
        "without a projection",
    ),
    "has a task": (
        {"name": "taught/checkpoints/one", "tasks": {"x": "topic"}},
        "for a task itself",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_is_written(case, land, stacks, exported):
    options, line = WRONG[case]
    options = {"name": "plain/checkpoints/one", "out": "none"} | options
    options |= {
        key: str(land / options[key])
        for key in ("name", "out", "encoder", "decoder")
        if key in options
    }
    options |= {"tasks": {key: land / path for key, path in options.get("tasks", {}).items()}}
    before = sorted(land.iterdir())
    with pytest.raises(ValueError, match=line):
        export(**options)
    assert sorted(land.iterdir()) == before


def test_another_llm_than_in_training_is_refused(land):
    """A checkpoint's record says which it was."""
    folder = write_stack(land, "other")
    record = {"identity": {"model.causal": False, "model.decoder": "x"}}
    names = ("adapter_model.safetensors", "adapter_config.json", "projection.safetensors")
    record["files"] = {name: files.sha256_of(folder / name) for name in names}
    (folder / "state.json").write_bytes(files.sealed(record))
    with pytest.raises(ValueError, match="was trained with another model.decoder"):
        export(folder, land / "none")


def test_the_command(land, stacks, capsys):
    out = land / "by-command"
    arguments = ["export", str(stacks["plain"]), "--out", str(out), "--language", "swh_Latn"]
    assert main([*arguments, "--task", f"topic={land / 'topic'}"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 0.00 GB")
    assert list(find_trained(out).tasks) == ["topic"]
    assert main(arguments) == 1
    assert "is there already" in capsys.readouterr().err
