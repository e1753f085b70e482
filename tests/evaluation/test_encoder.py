"""The encoder alone: its states are transformers', its head is the one minimum."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, M2M100ForConditionalGeneration

from mtllm_engine import evaluate as command
from mtllm_engine.evaluate import evaluate
from mtllm_engine.evaluation import encoder, provenance
from mtllm_engine.evaluation.encoder import EncoderReader, Examples, LinearHead, fit_head
from mtllm_engine.evaluation.predictions import load
from mtllm_engine.evaluation.systems import find_systems
from mtllm_engine.tasks import load_task
from mtllm_engine.tasks.sib200 import LABELS, SIB200
from tests.support.stages import (
    ALONE,
    BATCHES,
    build_models,
    write_belebele,
    write_questions,
    write_topics,
)
from tests.support.tiny import build_config, build_decoder, texts

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 64  # tokens: data.max_length


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = build_models(tmp_path_factory.mktemp("encoder"))
    write_topics(folder, "eng_Latn", train=24, dev=8, test=5)
    write_topics(folder, "swh_Latn", seed=9, test=9)
    write_topics(folder, "nqo_Nkoo", seed=10, test=3)
    write_questions(folder, train=12, dev=6)
    write_belebele(folder / "belebele" / "swh_Latn.jsonl", "swh_Latn")
    return folder


def config_of(folder: Path, name: str = "topics", **sections):
    source = f"sib200:{folder}/topics"
    tree = {
        "zero": {"stage": 0},
        "run": {"dir": str(folder / name)},
        "task": {"name": "sib200", "train": source, "validation": source, "test": [source]},
        "evaluate": {"systems": ["encoder"]},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return build_config(folder, **tree)


def write_hidden(folder: Path) -> None:
    """SIB-200's files whose labels are hidden."""
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("index_id\tcategory\ttext\n0\t-1\tword\n")


def states_by_transformers(folder: Path) -> dict[str, np.ndarray]:
    """Of each English example that is not cut the mean of NLLB's states, one text at a time."""
    model = M2M100ForConditionalGeneration.from_pretrained(folder / "encoder").get_encoder().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder", src_lang="eng_Latn")
    means = {}
    for example in SIB200.read(folder / "topics", "train", "eng_Latn"):
        inputs = tokenizer(example.text, return_tensors="pt")
        if inputs["input_ids"].shape[1] > LONGEST:
            continue
        with torch.no_grad():
            means[example.key] = model(**inputs).last_hidden_state[0].mean(0).numpy()
    return means


@pytest.mark.parametrize("batches", list(BATCHES))
def test_what_the_head_reads_is_the_mean_of_transformers_states(folder: Path, batches: str):
    sections = {**BATCHES[batches]}
    reader = EncoderReader(config_of(folder, **sections), ALONE, load_task("sib200"))
    corpus = folder / "topics" / "corpus" / "train"
    keys, _, rows = reader._read(corpus)
    expected, rows = states_by_transformers(folder), dict(zip(keys, rows))
    assert len(rows) == 24 and len(expected) > 5
    for key, state in expected.items():
        np.testing.assert_allclose(rows[key], state[None], atol=2e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_head_is_where_the_gradient_vanishes(seed: int):
    """Of the penalised cross-entropy, written out here; whatever units the features are in."""
    random = np.random.default_rng(seed)
    count, width, classes = random.integers((20, 3, 2), (60, 12, 6))
    features = torch.from_numpy(random.normal(size=(count, 1, width)) * 10.0**seed)
    labels = torch.from_numpy(random.integers(0, classes, count))
    shape = {"num_outputs": int(classes), "per_choice": False}
    head = fit_head(Examples(features, labels), **shape)
    weight, bias = head.weight_FE.clone().requires_grad_(), head.bias_F.clone().requires_grad_()
    flat = features[:, 0].double()
    normed = (flat - flat.mean(0)) / flat.std(0)
    loss = functional.cross_entropy(normed @ weight.T + bias, labels)
    (loss + encoder.PENALTY / 2 * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-5


def test_a_choice_that_is_not_there_is_never_taken():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, 5, generator=random)
    features[::3, 3] = float("nan")
    labels = features[..., 0].nan_to_num(nan=-9.0).argmax(1)
    head = fit_head(Examples(features, labels), num_outputs=4, per_choice=True)
    scores = head(features)
    assert (scores[::3, 3] == float("-inf")).all() and scores[:, :3].isfinite().all()
    assert (scores.argmax(1) == labels).double().mean() > 0.9


def test_one_example_is_enough_to_say_its_class():
    features = torch.randn(5, 1, 3, generator=torch.Generator().manual_seed(0))
    head = fit_head(Examples(features[:1], torch.tensor([2])), num_outputs=4, per_choice=False)
    assert (head(features).argmax(1) == 2).all()


def test_held_out_examples_choose_the_penalty(monkeypatch: pytest.MonkeyPatch):
    """Labels of noise: the fewer of the weights the better, but not where the rule is exact."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(80, 1, 4, generator=random)
    rule = (features[:, 0, 0] > 0).long()
    noisy = Examples(features[:40], torch.randint(0, 2, (40,), generator=random))
    held_out = Examples(features[40:], rule[40:])
    shape = {"num_outputs": 2, "per_choice": False}
    heads = {
        penalty: encoder._fit(fit_untrained(noisy), noisy, penalty) for penalty in encoder.PENALTIES
    }
    best = max(encoder._num_right(head, held_out) for head in heads.values())
    chosen = fit_head(noisy, held_out, **shape)
    assert encoder._num_right(chosen, held_out) == best
    first = next(head for head in heads.values() if encoder._num_right(head, held_out) == best)
    assert torch.allclose(chosen.weight_FE, first.weight_FE)


def fit_untrained(examples: Examples) -> LinearHead:
    flat = examples.features_NPE[:, 0].double()
    zeros = torch.zeros(2, flat.shape[1], dtype=torch.float64)
    parts = {"weight_FE": zeros, "bias_F": torch.zeros(2, dtype=torch.float64)}
    return LinearHead(mean_E=flat.mean(0), scale_E=flat.std(0), **parts)


def test_it_is_a_system_beside_the_others(folder: Path):
    """In English and Swahili; N'Ko, for which the encoder has no token, is left out."""
    evaluate(config_of(folder), ALONE)
    found = {item.language: item for item in load(folder / "topics" / "results")}
    assert {item.system for item in found.values()} == {"encoder"}
    counts = {language: len(item.keys) for language, item in found.items()}
    assert counts == {"eng_Latn": 5, "swh_Latn": 9, "nqo_Nkoo": 0}
    assert found["nqo_Nkoo"].language_status == "unknown"
    assert found["swh_Latn"].num_classes == len(LABELS)
    assert "| encoder |" in (folder / "topics" / "results" / "results.md").read_text()


def test_it_answers_questions_with_choices(folder: Path):
    config = config_of(
        folder,
        "questions",
        task={
            "name": "belebele",
            "train": f"belebele_training:{folder}/questions",
            "validation": f"belebele_training:{folder}/questions",
            "test": [f"belebele:{folder}/belebele"],
        },
    )
    evaluate(config, ALONE)
    (item,) = load(folder / "questions" / "results")
    assert len(item.keys) == 7 and item.num_classes == 4


def test_what_it_cannot_do_is_told_before_anything_is_loaded(folder: Path):
    config = config_of(folder)
    untaught = replace(config, task=replace(config.task, train="", validation=""))
    with pytest.raises(ValueError, match="no English examples for its head; set task.train"):
        find_systems(untaught)
    spans = replace(config.task, name="xquad", train=f"squad:{folder}", test=(f"xquad:{folder}",))
    with pytest.raises(ValueError, match="'encoder', but task xquad is answered with a piece"):
        find_systems(replace(config, task=spans))
    write_hidden(folder / "hidden" / "eng_Latn")
    hidden = f"sib200:{folder}/hidden"
    for split in ("train", "validation"):
        unlabelled = replace(config.task, **{split: hidden})
        with pytest.raises(ValueError, match=f"task.{split} has no labels: {hidden}; set another"):
            find_systems(replace(config, task=unlabelled))
    nowhere = replace(config.task, train=f"sib200:{folder}/nowhere")
    with pytest.raises(ValueError, match="nowhere has no data/annotated/eng_Latn/train.tsv"):
        find_systems(replace(config, task=nowhere))


def test_a_killed_evaluation_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What the very same would make again stays; with files of ours that differ all is made."""
    asked = []

    def predict(config, world, task, reader, translator, test):
        asked.append(test.language)
        return predict_once(config, world, task, reader, translator, test)

    predict_once = command.predict
    monkeypatch.setattr(command, "predict", predict)
    monkeypatch.setattr(provenance, "commit", lambda: "0123456789ab")
    results = folder / "again" / "results"
    evaluate(config_of(folder, "again"), ALONE)
    first = {path.name: path.read_text() for path in results.rglob("predictions-*")}
    assert sorted(asked) == ["eng_Latn", "nqo_Nkoo", "swh_Latn"] and len(first) == 3
    path = results / "sib200" / "encoder" / "predictions-swh_Latn-0.jsonl"
    for damage in (path.unlink, lambda: path.write_text(path.read_text()[:-9])):
        asked.clear()
        damage()
        evaluate(config_of(folder, "again"), ALONE)
        assert asked == ["swh_Latn"]
    kept = {path.name: path.read_text() for path in results.rglob("predictions-*")}
    assert {name: text.split("\n")[1:] for name, text in kept.items()} == {
        name: text.split("\n")[1:] for name, text in first.items()
    }
    assert "left out" not in (results / "results.md").read_text()
    # Another language declared for the one that the encoder lacks.
    for other in ("swh_Latn", "ind_Latn"):
        asked.clear()
        evaluate(config_of(folder, "again", languages={"fallback": {"nqo_Nkoo": other}}), ALONE)
        assert asked == ["nqo_Nkoo"]
        (item,) = load(path.with_name("predictions-nqo_Nkoo-0.jsonl"))
        assert item.language_given == other and len(item.keys) == 3
    # Another tokenizer of the LLM: texts are cut where both agree.
    asked.clear()
    other = build_decoder(folder / "other", samples=texts(50, seed=3))
    evaluate(config_of(folder, "again", model={"decoder": str(other)}), ALONE)
    assert len(asked) == 3
    # Other settings, and code that differs from its commit.
    asked.clear()
    evaluate(config_of(folder, "again", data={"max_length": 32}), ALONE)
    assert len(asked) == 3
    monkeypatch.setattr(provenance, "commit", lambda: "0123456789ab+")
    asked.clear()
    evaluate(config_of(folder, "again", data={"max_length": 32}), ALONE)
    assert len(asked) == 3
