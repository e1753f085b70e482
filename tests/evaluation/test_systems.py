"""Evaluation of real runs' checkpoints: every document once, in order, whatever the batches; what
lacks a language."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mtllm_engine import evaluate as command
from mtllm_engine.config import FOLLOWING, Config
from mtllm_engine.data.batch import Document
from mtllm_engine.data.tokenizers import PairTokenizer, load_tokenizer
from mtllm_engine.evaluate import evaluate
from mtllm_engine.evaluation import systems
from mtllm_engine.evaluation.predictions import Predictions, load
from mtllm_engine.evaluation.systems import cost
from mtllm_engine.evaluation.translate import translate_examples
from mtllm_engine.tasks import belebele
from mtllm_engine.tasks.sib200 import SIB200
from mtllm_engine.train import train
from mtllm_engine.training.origins import add_up
from tests.support.padded import Padded, assert_close, load_llm, mean_pool
from tests.support.stages import (
    ALONE,
    BATCHES,
    build_models,
    checkpoint,
    evaluation_config,
    recorded_scores,
    rows,
    run_stages,
    stage2_config,
    write_belebele,
    write_questions,
    write_topics,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LANGUAGES = {"eng_Latn": 5, "swh_Latn": 9, "min_Arab": 4, "nqo_Nkoo": 3}
"""Examples of each; the last two are not NLLB's."""
GIVEN = {
    "eng_Latn": ("known", "eng_Latn"),
    "swh_Latn": ("known", "swh_Latn"),
    "min_Arab": ("fallback", "ind_Latn"),
    "nqo_Nkoo": ("unknown", None),
}
"""What an encoder is given for them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Stage 1, topics and questions learned in English, stage 2, and test sets."""
    folder = build_models(tmp_path_factory.mktemp("evaluate"))
    write_topics(folder, "eng_Latn", train=16, dev=6)
    for number, (language, count) in enumerate(LANGUAGES.items()):
        write_topics(folder, language, seed=10 + number, test=count)
    write_questions(folder, train=16, dev=6)
    for language in ("eng_Latn", "swh_Latn"):
        write_belebele(folder / "belebele" / f"{language}.jsonl", language)
    for task in ("sib200", "belebele"):
        run_stages(folder, task)
    return folder


def topics_config(folder: Path, **sections) -> Config:
    return evaluation_config(folder, "sib200", f"sib200:{folder}/topics", **sections)


def questions_config(folder: Path, **sections) -> Config:
    return evaluation_config(folder, "belebele", f"belebele:{folder}/belebele", **sections)


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> tuple[Path, dict[str, dict]]:
    """The results' folder, and all scores."""
    with recorded_scores() as scores:
        evaluate(topics_config(folder), ALONE)
    return folder / "evaluate-sib200" / "results", scores


def saved(results_folder: Path) -> dict[tuple[str, str], Predictions]:
    return {(item.system, item.language): item for item in load(results_folder)}


def test_a_language_that_the_encoder_lacks_is_for_the_llm_alone(evaluated: tuple[Path, dict]):
    predictions = saved(evaluated[0])
    expected = {("llm", language): (None, None) for language in LANGUAGES}
    for system in ("stack", "translate_test"):
        expected |= {(system, language): given for language, given in GIVEN.items()}
    items = predictions.items()
    assert {pair: (item.language_status, item.language_given) for pair, item in items} == expected
    silent = [pair for pair, item in items if not item.keys]
    assert silent == [("stack", "nqo_Nkoo"), ("translate_test", "nqo_Nkoo")]


def test_what_is_saved_is_the_best_class_of_every_example(
    folder: Path, evaluated: tuple[Path, dict]
):
    results_folder, scores = evaluated
    for (system, language), item in saved(results_folder).items():
        if not item.keys:
            continue
        examples = list(SIB200.read(folder / "topics", "test", language))
        read = "translated" if system == "translate_test" else system
        reader = scores[f"{read}/sib200/{language}"]
        assert list(item.keys) == reader["keys"] == [example.key for example in examples]
        assert item.labels.tolist() == reader["labels"] == [example.label for example in examples]
        assert item.predictions.tolist() == np.argmax(reader["scores"], axis=1).tolist()
        about = (item.metric, item.num_classes, item.seed, item.dataset)
        assert about == ("accuracy", 7, 0, "sib200")


def test_tables_mark_the_fallback_and_average_the_foreign_languages(evaluated: tuple[Path, dict]):
    text = (evaluated[0] / "results.md").read_text()
    assert "| min_Arab* |" in text and "| swh_Latn |" in text and "| average (2) |" in text
    assert "| nqo_Nkoo† |" in text and "* min_Arab was given to the encoder as ind_Latn" in text
    assert "sib200, accuracy: stack - translate_test" in text
    content = json.loads((evaluated[0] / "results.json").read_text())
    assert content["tables"][0]["averaged"]["average, known"] == ["swh_Latn"]


def test_english_is_not_translated(evaluated: tuple[Path, dict]):
    _, scores = evaluated
    assert scores["translated/sib200/eng_Latn"] == scores["llm/sib200/eng_Latn"]
    assert scores["translated/sib200/swh_Latn"] != scores["llm/sib200/swh_Latn"]


@pytest.mark.parametrize("language", ["swh_Latn", "min_Arab"])
def test_scores_of_the_stack_are_those_of_transformers(
    folder: Path, evaluated: tuple[Path, dict], language: str
):
    """The encoder reads NLLB's source format, under the fallback's token where that is declared."""
    config = topics_config(folder)
    tokenizer = load_tokenizer(config.model.encoder)
    prefix = tokenizer.convert_tokens_to_ids({"min_Arab": "ind_Latn"}.get(language, language))
    texts = short_texts(folder, language, config)
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = [np.array([prefix, *of_text, tokenizer.eos_token_id]) for of_text in tokens]
    llm = opened_llm(config, *config.model.init_from)
    padded = Padded(config, llm, linear(config, "projection"), linear(config, "head"))
    assert_scores(evaluated[1][f"stack/sib200/{language}"], padded, ids, "student")


def test_scores_of_the_llm_are_those_of_transformers(folder: Path, evaluated: tuple[Path, dict]):
    config = topics_config(folder)
    tokenizer = load_tokenizer(config.model.decoder)
    texts = short_texts(folder, "nqo_Nkoo", config)
    ids = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    llm = opened_llm(config, config.model.teacher)
    padded = Padded(config, llm, head=linear(config, "head"))
    assert_scores(evaluated[1]["llm/sib200/nqo_Nkoo"], padded, ids, "teacher")


def short_texts(folder: Path, language: str, config: Config) -> list[str]:
    """Of a test set, "" for one that is cut at data.max_length: the comparison cuts none."""
    texts = [example.text for example in SIB200.read(folder / "topics", "test", language)]
    for side in (config.model.encoder, config.model.decoder):
        tokenizer = load_tokenizer(side)
        lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
        limit = config.data.max_length
        texts = [text if length < limit else "" for text, length in zip(texts, lengths)]
    assert sum(map(bool, texts)) >= 2
    return texts


def opened_llm(config: Config, adapters: str) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(load_llm(config), adapters)


def linear(config: Config, name: str) -> nn.Linear:
    """The projection, or the head, of the stack's checkpoint; the head is the LLM's."""
    saved = load_file(f"{config.model.init_from[0]}/{name}.safetensors")
    tensors = {key.removeprefix(f"{name}."): value for key, value in saved.items()}
    layer = nn.Linear(*tensors["weight"].T.shape, bias="bias" in tensors)
    layer.load_state_dict(tensors)
    return layer


@torch.no_grad()
def assert_scores(ours: dict, padded: Padded, ids: Sequence[np.ndarray], side: str) -> None:
    """Of the texts that `short_texts` kept."""
    kept = [len(row) > 2 for row in ids]
    rows = [row if is_kept else np.zeros(1, np.int64) for row, is_kept in zip(ids, kept)]
    documents = [Document(key="", seed=0, student_ids_S=row, teacher_ids_T=row) for row in rows]
    theirs_NY = padded.head(mean_pool(*padded.states(documents, side)))
    kept_N = torch.tensor(kept)
    assert_close(torch.tensor(ours["scores"])[kept_N], theirs_NY[kept_N])


@pytest.mark.parametrize("name", BATCHES)
def test_scores_do_not_depend_on_the_batches(folder: Path, evaluated: tuple[Path, dict], name: str):
    options = {"systems": ["llm", "stack"], "languages": ["swh_Latn"]}
    options |= {"results": str(folder / "batches" / name)}
    with recorded_scores() as scores:
        evaluate(topics_config(folder, evaluate=options, **BATCHES[name]), ALONE)
    assert scores.keys() == {"llm/sib200/swh_Latn", "stack/sib200/swh_Latn"}
    for corpus, of_corpus in scores.items():
        assert_same_scores(of_corpus, evaluated[1][corpus])


def assert_same_scores(scores: dict, expected: dict) -> None:
    assert scores["keys"] == expected["keys"] and scores["labels"] == expected["labels"]
    assert_close(torch.tensor(scores["scores"]), torch.tensor(expected["scores"]))


def test_choices_do_not_depend_on_the_batches_either(folder: Path):
    runs = []
    for name in ("one by one", "all at once"):
        options = {"systems": ["llm", "stack"], "results": str(folder / "choices" / name)}
        with recorded_scores() as scores:
            evaluate(questions_config(folder, evaluate=options, **BATCHES[name]), ALONE)
        runs.append(scores)
    assert runs[0].keys() == {
        f"{reader}/belebele/{code}"
        for reader in ("llm", "stack")
        for code in ("eng_Latn", "swh_Latn")
    }
    for corpus, scores in runs[0].items():
        assert scores["keys"] == list("0123456") and scores["labels"] == [0, 1, 2, 3, 0, 1, 2]
        assert np.shape(scores["scores"]) == (7, 4)
        assert_same_scores(scores, runs[1][corpus])


def test_choices_of_texts_in_lines_are_scored_as_transformers_scores_them(folder: Path):
    """Each choice is a line; the LLM alone reads what it always does."""
    scores = {}
    for parts in ("whole", "lines"):
        options = {"systems": ["llm", "stack"], "results": str(folder / "parts" / parts)}
        config = questions_config(folder, evaluate=options, data={"train": [], "parts": parts})
        with recorded_scores() as scores[parts]:
            evaluate(config, ALONE)
        made = load(folder / "parts" / parts)
        settings = {item.system: item.maker["settings"].get("data.parts") for item in made}
        assert settings == {"llm": None, "stack": parts}
    llm = opened_llm(config, *config.model.init_from)
    padded = Padded(config, llm, linear(config, "projection"), linear(config, "head"))
    tokenizer = PairTokenizer(
        *(config.model.encoder, config.model.decoder),
        max_length=config.data.max_length,
        parts="lines",
        reader="stack",
    )
    for language in ("eng_Latn", "swh_Latn"):
        whole, lines = (scores[parts][f"stack/belebele/{language}"]["scores"] for parts in scores)
        documents = []
        for example in belebele.task.datasets["belebele"].read(
            folder / "belebele", "test", language
        ):
            read, _ = tokenizer.example(example.text, language, example)
            ids = {"student_ids_S": read.ids_S, "teacher_ids_T": read.ids_S}
            spans = dict.fromkeys(("student_spans_P2", "teacher_spans_P2"), read.spans_P2)
            documents.append(Document(key="", seed=0, **ids, **spans, parts_Q2=read.parts_Q2))
        with torch.no_grad():
            expected = torch.stack(padded.scores(documents, "student", "belebele"))
        assert_close(torch.tensor(lines), expected)
        assert np.abs(np.subtract(whole, lines)).max() > 0.01
        name = f"llm/belebele/{language}"
        assert scores["lines"][name] == scores["whole"][name]


@pytest.mark.parametrize("systems", [["stack"], ["llm", "stack"]])
def test_what_another_tokenizer_would_make_of_a_text_cuts_nothing(
    folder: Path, tmp_path: Path, systems: list[str]
):
    """Of Odia the LLM's makes many more tokens: too many for choices alone, which are scored all
    the same."""
    words = ["ଓଡ଼ିଆ", "ଭାଷା", "ପାଠ"]
    row = {"flores_passage": " ".join(words), "question": "ପ୍ରଶ୍ନ?", "correct_answer_num": "2"}
    row |= {f"mc_answer{number}": " ".join(words[:number]) for number in range(1, 4)}
    row |= {"mc_answer4": "ନା"}
    (tmp_path / "belebele").mkdir()
    (tmp_path / "belebele" / "ory_Orya.jsonl").write_text(json.dumps(row) + "\n")
    runs = []
    for length in (64, 256):
        data = {"train": [], "max_length": length, "pack_documents": 1}
        options = {"systems": systems, "results": str(tmp_path / str(length))}
        sections = {"evaluate": options, "data": data, "memory": {"max_tokens": 256}}
        test = f"belebele:{tmp_path}/belebele"
        with recorded_scores() as scores:
            evaluate(evaluation_config(folder, "belebele", test, **sections), ALONE)
        runs.append(scores)
    assert len(runs[0]) == len(systems)
    assert_same_scores(*(run["stack/belebele/ory_Orya"] for run in runs))


def test_cost_is_that_of_all_runs_below(folder: Path, evaluated: tuple[Path, dict]):
    """The stack stands on stage 1 and on the fine-tuned LLM; on one rank, hours are the steps'."""
    taken = {}
    for name in ("stage1", "finetune-sib200", "stage2-sib200"):
        steps = [row for row in rows(folder / name) if "loss" in row]
        hours = sum(row["step_s"] for row in steps) / 3600
        taken[name] = np.array([hours, sum(row["flops"] for row in steps)])
    predictions = saved(evaluated[0])
    for system, expected in (("stack", sum(taken.values())), ("llm", taken["finetune-sib200"])):
        item = predictions[system, "swh_Latn"]
        assert (item.gpu_hours, item.flops) == pytest.approx(tuple(expected)) and item.flops > 0
    assert cost([checkpoint(folder, "stage2-sib200")]) == pytest.approx(tuple(sum(taken.values())))


def test_what_a_copied_checkpoint_took_is_not_known(folder: Path, tmp_path: Path):
    target = tmp_path / "run" / "checkpoints" / "step-00000003"
    target.mkdir(parents=True)
    assert cost([target]) == (None, None)


def started(folder: Path, run: str) -> str:
    name = "latest" if run == "stage1" else "best"
    return str(checkpoint(folder, run, name))


@pytest.fixture(scope="module")
def summed(folder: Path) -> tuple[Path, dict[str, dict], Path]:
    """Results and scores of stage 1 and the fine-tuned LLM added up, and the folder of that."""
    stage1, task = (started(folder, run) for run in ("stage1", "finetune-sib200"))
    options = {"systems": ["sum", "llm"], "stage1": stage1, "results": str(folder / "summed")}
    with recorded_scores() as scores:
        evaluate(topics_config(folder, evaluate=options), ALONE)
    add_up([stage1, task], folder / "sum")
    return folder / "summed", scores, folder / "sum"


def test_the_sum_is_the_stack_of_its_folder(
    folder: Path, evaluated: tuple[Path, dict], summed: tuple[Path, dict, Path]
):
    """On the same examples exactly; beside a stack it leaves that as it is."""
    options = {"systems": ["stack", "sum"], "results": str(folder / "both")}
    options |= {"stage1": started(folder, "stage1")}
    evaluate(topics_config(folder, evaluate=options), ALONE)
    options = {"systems": ["stack"], "results": str(folder / "of-folder")}
    of_folder = topics_config(folder, evaluate=options, model={"init_from": str(summed[2])})
    with recorded_scores() as scores:
        evaluate(of_folder, ALONE)
    assert {name for name in summed[1] if name.startswith("stack/")} == scores.keys()
    assert all(summed[1][name] == of_corpus for name, of_corpus in scores.items())
    first, both, whole, before = map(
        saved, (summed[0], folder / "both", folder / "of-folder", evaluated[0])
    )
    differ = 0
    for language, given in GIVEN.items():
        item, same = first["sum", language], whole["stack", language]
        assert (item.language_status, item.language_given) == given
        assert item.keys == same.keys and np.array_equal(item.labels, same.labels)
        for other in (both["sum", language], same):
            assert np.array_equal(item.predictions, other.predictions)
        stacks = [each["stack", language].predictions for each in (both, before)]
        assert np.array_equal(*stacks)
        differ += not np.array_equal(stacks[0], item.predictions)
    assert differ
    assert "| llm | sum |" in (summed[0] / "results.md").read_text()


def taken(folder: Path, *runs: str) -> np.ndarray:
    """GPU-hours and FLOPs of the steps of runs, of one rank each."""
    steps = [row for run in runs for row in rows(folder / run) if "loss" in row]
    return np.array(
        [sum(row["step_s"] for row in steps) / 3600, sum(row["flops"] for row in steps)]
    )


def test_a_sum_costs_what_its_parts_did_and_stage_2_adds_its_own(
    folder: Path, summed: tuple[Path, dict, Path], tmp_path: Path
):
    """Each run counts once, also where the sum's second part is the teacher too."""
    stage1, task = (started(folder, run) for run in ("stage1", "finetune-sib200"))
    item = saved(summed[0])["sum", "swh_Latn"]
    parts = taken(folder, "stage1", "finetune-sib200")
    assert (item.gpu_hours, item.flops) == pytest.approx(tuple(parts)) and item.flops > 0
    assert cost([str(summed[2])]) == pytest.approx(tuple(parts))
    assert cost([str(summed[2]), task]) == pytest.approx(tuple(parts))
    for name, starts in (("of-parts", [stage1, task]), ("of-folder", [str(summed[2])])):
        run = {"dir": str(folder / name)}
        lora = {"train": "first", **FOLLOWING} if starts[1:] else {"rank": 8, "alpha": 16.0}
        model = {"init_from": starts}
        train(stage2_config(folder, "sib200", run=run, lora=lora, model=model), ALONE)
        expected = parts + taken(folder, name)
        assert cost([started(folder, name)]) == pytest.approx(tuple(expected))
    copied = tmp_path / "run" / "checkpoints" / "step-00000003"
    shutil.copytree(task, copied)
    assert cost([stage1, str(copied)]) == (None, None)


@pytest.mark.parametrize(
    ("stage1", "teacher", "message"),
    [
        ("", "finetune-sib200", "'sum', which needs evaluate.stage1, a checkpoint of stage 1;"),
        ("stage1", "", "'sum', which needs model.teacher, a checkpoint with a head; it is empty"),
        ("stage2-sib200", "", "'sum', which needs model.teacher, a checkpoint with a head; it is"),
        ("stage1", "stage1", "'sum', which needs model.teacher, a checkpoint with a head; /"),
        ("stage2-sib200", "finetune-sib200", " have a head each; a sum has one"),
    ],
)
def test_what_a_sum_lacks_or_has_twice_is_named(
    folder: Path, tmp_path: Path, stage1: str, teacher: str, message: str
):
    options = {"systems": ["sum"], "results": str(tmp_path / "results")}
    options |= {"stage1": started(folder, stage1) if stage1 else ""}
    model = {"teacher": started(folder, teacher) if teacher else "", "init_from": ""}
    with pytest.raises(ValueError) as error:
        evaluate(topics_config(folder, evaluate=options, model=model), ALONE)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "model",
            {"teacher": ""},
            "'llm', which needs model.teacher, a checkpoint with a head; it is empty",
        ),
        (
            "model",
            {"init_from": ()},
            "'stack', which needs model.init_from, a checkpoint with a head; it is empty",
        ),
        (
            "model",
            {"init_from": "stage1/checkpoints/latest"},
            "'stack', which needs model.init_from, a checkpoint with a head; /",
        ),
        ("task", {"test": ()}, "task.test names no test set; write DATASET:FOLDER"),
        (
            "task",
            {"test": ("xnli:there",)},
            "'xnli:there': write DATASET:FOLDER; data sets of sib200 are sib200",
        ),
        (
            "task",
            {"test": ("sib200:nowhere",)},
            "sib200:nowhere has no test examples in any language",
        ),
        (
            "languages",
            {"fallback": {"min_Arab": "arb_Latn"}},
            "languages.fallback.min_Arab=arb_Latn",
        ),
        (
            "evaluate",
            {"languages": ("swh_Latn", "deu_Latn")},
            "evaluate.languages has deu_Latn, which is in no test set of sib200:",
        ),
        (
            "evaluate",
            {"systems": ("stack",), "languages": ("nqo_Nkoo",)},
            "task.test: the encoder has no token for any language of sib200:",
        ),
    ],
)
def test_what_is_missing_is_named_before_any_model_runs(
    folder: Path, tmp_path: Path, section: str, values: dict, message: str
):
    if values.get("init_from"):
        values = {"init_from": (str(folder / values["init_from"]),)}
    config = topics_config(folder, evaluate={"results": str(tmp_path / "results")})
    config = replace(config, **{section: replace(getattr(config, section), **values)})
    with pytest.raises(ValueError) as error:
        evaluate(config, ALONE)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "9\t-1\tor",
            "task.test: sib200:{}/topics in swh_Latn: example 9 has no label; "
            "leave this test set out",
        ),
        (
            "9\tsport\tor",
            "{}/topics/swh_Latn/test.tsv:5: column 'category' should be one of "
            "science/technology, ",
        ),
    ],
)
def test_every_test_set_is_read_before_any_model_is(
    folder: Path, tmp_path: Path, monkeypatch, row: str, message: str
):
    for language in ("eng_Latn", "swh_Latn"):
        write_topics(tmp_path, language, test=3)
    with (tmp_path / "topics" / "swh_Latn" / "test.tsv").open("a") as file:
        file.write(f"{row}\n")
    monkeypatch.setattr(command, "Reader", None)
    with pytest.raises(ValueError) as error:
        evaluate(evaluation_config(folder, "sib200", f"sib200:{tmp_path}/topics"), ALONE)
    assert str(error.value).startswith(message.format(tmp_path)) and "\n" not in str(error.value)


def test_languages_are_those_of_each_test_set(folder: Path, tmp_path: Path, capsys):
    """One that only the other has is no error; a test set that is left without any is."""
    write_topics(tmp_path, "deu_Latn", seed=20, test=3)
    sources = [f"sib200:{each}/topics" for each in (folder, tmp_path)]

    def config(*languages: str) -> Config:
        options = {"systems": ["llm"], "languages": languages, "results": str(tmp_path / "results")}
        of_one = topics_config(folder, evaluate=options)
        return replace(of_one, task=replace(of_one.task, test=tuple(sources)))

    evaluate(config("deu_Latn", "swh_Latn"), ALONE)
    assert "LLM's weights: whole on 1 CPU rank (zero.stage=0)\n" in capsys.readouterr().out
    items = saved(tmp_path / "results").items()
    counts = {language: len(item.keys) for (_, language), item in items}
    assert counts == {"deu_Latn": 3, "swh_Latn": LANGUAGES["swh_Latn"]}
    message = f"^task.test: {sources[1]} has no test examples in any .* evaluate.languages"
    with pytest.raises(ValueError, match=message):
        evaluate(config("swh_Latn"), ALONE)


def test_latency_has_what_translating_took_when_it_was_done(
    folder: Path, tmp_path: Path, monkeypatch
):
    """Whichever run that was; English, which is not translated, has no part in it."""
    spent_s = []

    def recorded(*args, **options):
        translated = translate_examples(*args, **options)
        spent_s.append(translated.wall_s)
        return translated

    monkeypatch.setattr(systems, "translate_examples", recorded)
    options = {"systems": ["translate_test"], "languages": ["eng_Latn", "swh_Latn"]}
    options |= {"translations": str(tmp_path / "translations")}
    runs = []
    for name in ("first", "second"):
        evaluate(topics_config(folder, evaluate=options | {"results": str(tmp_path / name)}), ALONE)
        runs.append(saved(tmp_path / name))
    assert spent_s[0] == pytest.approx(spent_s[1]) and spent_s[0] > 0
    assert [each["translate_test", "eng_Latn"].latency_s for each in runs] == [None, None]
    latencies_s = [each["translate_test", "swh_Latn"].latency_s for each in runs]
    assert min(latencies_s) > 1000 * spent_s[0] / LANGUAGES["swh_Latn"]
    assert [path.parent.name for path in tmp_path.rglob("swh_Latn-*.jsonl")] == ["translations"]
