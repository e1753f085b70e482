"""Evaluation of real runs' checkpoints: every document once, in order, whatever the batches; what lacks a language."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from mtllm_engine import evaluate as evaluation
from mtllm_engine import results
from mtllm_engine.config import Config
from mtllm_engine.data.batch import Document
from mtllm_engine.data.tokenizers import load_tokenizer
from mtllm_engine.evaluate import cost, evaluate
from mtllm_engine.results import Predictions
from mtllm_engine.tasks import Example, join
from mtllm_engine.tasks.belebele import compose
from mtllm_engine.tasks.sib200 import SIB200
from mtllm_engine.translate import Translations, translate_examples
from stages import (
    ALONE,
    build_models,
    checkpoint,
    evaluation_config,
    recorded_scores,
    rows,
    run_stages,
    write_belebele,
    write_questions,
    write_topics,
)
from test_finetune import Padded
from test_model import assert_close, load_llm, mean_pool

LANGUAGES = {"eng_Latn": 5, "swh_Latn": 9, "min_Arab": 4, "nqo_Nkoo": 3}  # the last two: not NLLB's
GIVEN = {  # to an encoder
    "eng_Latn": ("known", "eng_Latn"),
    "swh_Latn": ("known", "swh_Latn"),
    "min_Arab": ("fallback", "ind_Latn"),
    "nqo_Nkoo": ("unknown", None),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small gain nothing from a second thread, and lose much where the other cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    with recorded_scores() as found:
        evaluate(topics_config(folder), ALONE)
    return folder / "evaluate-sib200" / "results", found


def saved(results_folder: Path) -> dict[tuple[str, str], Predictions]:
    return {(item.system, item.language): item for item in results.load(results_folder)}


def test_a_language_that_the_encoder_lacks_is_for_the_llm_alone(evaluated: tuple[Path, dict]):
    found = saved(evaluated[0])
    told = {pair: (item.language_status, item.language_given) for pair, item in found.items()}
    expected = {("llm", language): (None, None) for language in LANGUAGES}
    expected |= {(system, language): GIVEN[language] for system in ("stack", "translate_test") for language in GIVEN}
    assert told == expected
    assert [pair for pair, item in found.items() if not item.keys] == [
        ("stack", "nqo_Nkoo"),
        ("translate_test", "nqo_Nkoo"),
    ]


def test_what_is_saved_is_the_best_class_of_every_example(folder: Path, evaluated: tuple[Path, dict]):
    results_folder, scores = evaluated
    found = {pair: item for pair, item in saved(results_folder).items() if item.keys}
    for (system, language), item in found.items():
        examples = list(SIB200.read(folder / "topics", "test", language))
        reader = scores[f"{'translated' if system == 'translate_test' else system}/sib200/{language}"]
        assert list(item.keys) == reader["keys"] == [example.key for example in examples]
        assert item.labels.tolist() == reader["labels"] == [example.label for example in examples]
        assert item.predictions.tolist() == np.argmax(reader["scores"], axis=1).tolist()
        assert (item.metric, item.num_classes, item.seed, item.dataset) == ("accuracy", 7, 0, "sib200")


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
def test_scores_of_the_stack_are_those_of_transformers(folder: Path, evaluated: tuple[Path, dict], language: str):
    """The encoder reads NLLB's source format, under the fallback's token where that is declared."""
    config = topics_config(folder)
    tokenizer = load_tokenizer(config.model.encoder)
    prefix = tokenizer.convert_tokens_to_ids({"min_Arab": "ind_Latn"}.get(language, language))
    ids = [
        np.array([prefix, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        for text in short_texts(folder, language, config)
    ]
    padded = Padded(config, opened_llm(config, config.model.start), linear(config, "projection"))
    assert_scores(evaluated[1][f"stack/sib200/{language}"], padded, ids, "student", linear(config, "head"))


def test_scores_of_the_llm_are_those_of_transformers(folder: Path, evaluated: tuple[Path, dict]):
    config = topics_config(folder)
    tokenizer = load_tokenizer(config.model.decoder)
    ids = [np.array(tokenizer(text)["input_ids"]) for text in short_texts(folder, "nqo_Nkoo", config)]
    padded = Padded(config, opened_llm(config, config.model.teacher))
    assert_scores(evaluated[1]["llm/sib200/nqo_Nkoo"], padded, ids, "teacher", linear(config, "head"))


def short_texts(folder: Path, language: str, config: Config) -> list[str]:
    """Of a test set: none is cut at data.max_length, or the comparison would have to cut it too."""
    found = [example.text for example in SIB200.read(folder / "topics", "test", language)]
    for side in (config.model.encoder, config.model.decoder):
        fits = [len(load_tokenizer(side)(text)["input_ids"]) < config.data.max_length for text in found]
        found = [text if is_short else "" for text, is_short in zip(found, fits)]
    assert sum(map(bool, found)) >= 2
    return found


def opened_llm(config: Config, adapters: str) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(load_llm(config), adapters)


def linear(config: Config, name: str) -> nn.Linear:
    """The projection, or the head, of the stack's checkpoint; the head is the LLM's."""
    tensors = {
        key.removeprefix(f"{name}."): value
        for key, value in load_file(f"{config.model.start}/{name}.safetensors").items()
    }
    made = nn.Linear(*tensors["weight"].T.shape, bias="bias" in tensors)
    made.load_state_dict(tensors)
    return made


@torch.no_grad()
def assert_scores(found: dict, padded: Padded, ids: Sequence[np.ndarray], side: str, head: nn.Linear) -> None:
    empty = np.zeros(1, np.int64)
    documents = [
        Document(key="", seed=0, student_ids_S=row_S, teacher_ids_T=row_S)
        for row_S in (row_S if len(row_S) > 2 else empty for row_S in ids)
    ]
    theirs_NC = head(mean_pool(*padded.states(documents, side)))
    kept_N = torch.tensor([len(row_S) > 2 for row_S in ids])
    assert_close(torch.tensor(found["scores"])[kept_N], theirs_NC[kept_N])


BATCHES = {  # keys that say how documents are batched, and nothing else
    "one lane": {"data": {"train": [], "lanes": 1}},
    "more lanes than documents": {"data": {"train": [], "lanes": 64}},
    "packs by tokens": {"data": {"train": [], "pack_documents": 0, "pack_tokens": 100}},
    "all at once": {"memory": {"max_tokens": 100_000}},
    "one by one": {"data": {"train": [], "lanes": 3, "pack_documents": 1}, "memory": {"max_tokens": 64}},
}


@pytest.mark.parametrize("name", BATCHES)
def test_scores_do_not_depend_on_the_batches(folder: Path, evaluated: tuple[Path, dict], name: str):
    options = {"systems": ["llm", "stack"], "languages": ["swh_Latn"], "results": str(folder / "batches" / name)}
    with recorded_scores() as found:
        evaluate(topics_config(folder, evaluate=options, **BATCHES[name]), ALONE)
    assert found.keys() == {"llm/sib200/swh_Latn", "stack/sib200/swh_Latn"}
    for corpus, scores in found.items():
        assert_same_scores(scores, evaluated[1][corpus])


def assert_same_scores(found: dict, expected: dict) -> None:
    assert found["keys"] == expected["keys"] and found["labels"] == expected["labels"]
    assert_close(torch.tensor(found["scores"]), torch.tensor(expected["scores"]))


def test_choices_do_not_depend_on_the_batches_either(folder: Path):
    options = {"systems": ["llm", "stack"]}
    runs = []
    for name, sections in ("one by one", BATCHES["one by one"]), ("all at once", BATCHES["all at once"]):
        own = options | {"results": str(folder / "choices" / name)}
        with recorded_scores() as found:
            evaluate(questions_config(folder, evaluate=own, **sections), ALONE)
        runs.append(found)
    assert runs[0].keys() == {
        f"{reader}/belebele/{code}" for reader in ("llm", "stack") for code in ("eng_Latn", "swh_Latn")
    }
    for corpus, scores in runs[0].items():
        assert scores["keys"] == list("0123456") and scores["labels"] == [0, 1, 2, 3, 0, 1, 2]
        assert np.shape(scores["scores"]) == (7, 4)
        assert_same_scores(scores, runs[1][corpus])


@pytest.mark.parametrize("systems", [["stack"], ["llm", "stack"]])
def test_what_another_tokenizer_would_make_of_a_text_cuts_nothing(folder: Path, tmp_path: Path, systems: list[str]):
    """Of Odia the LLM's makes many more tokens: too many for choices alone, which are scored nevertheless."""
    words = ["ଓଡ଼ିଆ", "ଭାଷା", "ପାଠ"]
    row = {"flores_passage": " ".join(words), "question": "ପ୍ରଶ୍ନ?", "correct_answer_num": "2"}
    row |= {f"mc_answer{number}": " ".join(words[:number]) for number in range(1, 4)} | {"mc_answer4": "ନା"}
    (tmp_path / "belebele").mkdir()
    (tmp_path / "belebele" / "ory_Orya.jsonl").write_text(json.dumps(row) + "\n")
    runs = []
    for length in (64, 256):
        data = {"train": [], "max_length": length, "pack_documents": 1}
        options = {"systems": systems, "results": str(tmp_path / str(length))}
        with recorded_scores() as found:
            config = evaluation_config(
                folder,
                "belebele",
                f"belebele:{tmp_path}/belebele",
                evaluate=options,
                data=data,
                memory={"max_tokens": 256},
            )
            evaluate(config, ALONE)
        runs.append(found)
    assert len(runs[0]) == len(systems)
    assert_same_scores(*(run["stack/belebele/ory_Orya"] for run in runs))


def test_cost_is_that_of_all_runs_below(folder: Path, evaluated: tuple[Path, dict]):
    """The stack stands on stage 1 and on the fine-tuned LLM; on one rank, hours are the steps' own."""
    taken = {}
    for name in ("stage1", "finetune-sib200", "distil-sib200"):
        steps = [row for row in rows(folder / name) if "loss" in row]
        taken[name] = np.array([sum(row["step_s"] for row in steps) / 3600, sum(row["flops"] for row in steps)])
    predictions = saved(evaluated[0])
    for system, expected in (("stack", sum(taken.values())), ("llm", taken["finetune-sib200"])):
        item = predictions[system, "swh_Latn"]
        assert (item.gpu_hours, item.flops) == pytest.approx(tuple(expected)) and item.flops > 0
    assert cost(checkpoint(folder, "distil-sib200")) == pytest.approx(tuple(sum(taken.values())))


def test_what_a_copied_checkpoint_took_is_not_known(folder: Path, tmp_path: Path):
    target = tmp_path / "run" / "checkpoints" / "step-00000003"
    target.mkdir(parents=True)
    assert cost(target) == (None, None)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"teacher": ""}, "'llm', which needs model.teacher, a checkpoint with a head; it is empty"),
        ("model", {"start": ""}, "'stack', which needs model.start, a checkpoint with a head; it is empty"),
        (
            "model",
            {"start": "stage1/checkpoints/latest"},
            "'stack', which needs model.start, a checkpoint with a head; /",
        ),
        ("task", {"test": ()}, "task.test names no test set; write DATASET:FOLDER"),
        ("task", {"test": ("xnli:there",)}, "'xnli:there': write DATASET:FOLDER; data sets of sib200 are sib200"),
        ("task", {"test": ("sib200:nowhere",)}, "sib200:nowhere has no test examples in any language"),
        ("languages", {"fallback": {"min_Arab": "arb_Latn"}}, "languages.fallback.min_Arab=arb_Latn"),
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
    values = {key: str(folder / value) if key == "start" and value else value for key, value in values.items()}
    config = topics_config(folder, evaluate={"results": str(tmp_path / "results")})
    config = replace(config, **{section: replace(getattr(config, section), **values)})
    with pytest.raises(ValueError) as error:
        evaluate(config, ALONE)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("9\t-1\tor", "task.test: sib200:{}/topics in swh_Latn: example 9 has no label; leave this test set out"),
        ("9\tsport\tor", "{}/topics/swh_Latn/test.tsv:5: column 'category' should be one of science/technology, "),
    ],
)
def test_every_test_set_is_read_before_any_model_is(folder: Path, tmp_path: Path, monkeypatch, row: str, message: str):
    for language in ("eng_Latn", "swh_Latn"):
        write_topics(tmp_path, language, test=3)
    with (tmp_path / "topics" / "swh_Latn" / "test.tsv").open("a") as file:
        file.write(f"{row}\n")
    monkeypatch.setattr(evaluation, "Reader", None)
    with pytest.raises(ValueError) as error:
        evaluate(evaluation_config(folder, "sib200", f"sib200:{tmp_path}/topics"), ALONE)
    assert str(error.value).startswith(message.format(tmp_path)) and "\n" not in str(error.value)


def test_languages_are_those_of_each_test_set(folder: Path, tmp_path: Path):
    """One that only the other has is no error; a test set that is left without any is."""
    write_topics(tmp_path, "deu_Latn", seed=20, test=3)
    sources = [f"sib200:{each}/topics" for each in (folder, tmp_path)]

    def config(*languages: str) -> Config:
        options = {"systems": ["llm"], "languages": languages, "results": str(tmp_path / "results")}
        made = topics_config(folder, evaluate=options)
        return replace(made, task=replace(made.task, test=tuple(sources)))

    evaluate(config("deu_Latn", "swh_Latn"), ALONE)
    assert {language: len(item.keys) for (_, language), item in saved(tmp_path / "results").items()} == {
        "deu_Latn": 3,
        "swh_Latn": LANGUAGES["swh_Latn"],
    }
    with pytest.raises(ValueError, match=f"^task.test: {sources[1]} has no test examples in any .* evaluate.languages"):
        evaluate(config("swh_Latn"), ALONE)


def test_latency_has_what_translating_took_when_it_was_done(folder: Path, tmp_path: Path, monkeypatch):
    """Whichever run that was; English, which is not translated, has no part in it."""
    spent_s = []

    def recorded(*args, **options):
        examples, wall_s = translate_examples(*args, **options)
        spent_s.append(wall_s)
        return examples, wall_s

    monkeypatch.setattr(evaluation, "translate_examples", recorded)
    options = {"systems": ["translate_test"], "languages": ["eng_Latn", "swh_Latn"]}
    options |= {"translations": str(tmp_path / "translations")}
    found = []
    for name in ("first", "second"):
        evaluate(topics_config(folder, evaluate=options | {"results": str(tmp_path / name)}), ALONE)
        found.append(saved(tmp_path / name))
    assert spent_s[0] == pytest.approx(spent_s[1]) and spent_s[0] > 0
    assert [each["translate_test", "eng_Latn"].latency_s for each in found] == [None, None]
    latencies_s = [each["translate_test", "swh_Latn"].latency_s for each in found]
    assert min(latencies_s) > 1000 * spent_s[0] / LANGUAGES["swh_Latn"]
    assert [path.parent.name for path in tmp_path.rglob("swh_Latn-*.jsonl")] == ["translations"]


class Shouting:
    """Stands for the translator: longer, in capitals, and nothing at all for some texts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str], *, source: str, target: str) -> Translations:
        assert (source, target) == ("swh_Latn", "eng_Latn")
        assert not any("\n" in text or "\r" in text for text in texts), "SentencePiece would read a space"
        self.asked += texts
        counts = {"translated": len(texts), "cached": 0, "cut": 0, "unfinished": 0, "tokens": 0}
        return Translations(texts=tuple(map(shouted, texts)), wall_s=3.0, **counts)


def shouted(core: str) -> str:
    return "" if core.startswith("x") else f"<{core.upper()}>!"


def said(piece: str) -> str:
    """What becomes of a piece without line breaks: white space around it stays, and so does what has no letter."""
    core = piece.strip()
    if not any(map(str.isalpha, core)):
        return piece
    before = piece[: len(piece) - len(piece.lstrip())]
    return before + (shouted(core) or core) + piece[len(piece.rstrip()) :]


def lines_said(text: str) -> str:
    return "\n".join(map(said, text.split("\n")))


def moved(*examples: Example) -> list[Example]:
    made, wall_s = translate_examples(examples, Shouting(), source="swh_Latn")
    assert wall_s == 3.0
    return made


LINE = st.text("ab xé漢1.,!?  ", min_size=1, max_size=12).filter(str.strip)
TEXT = st.lists(LINE, min_size=1, max_size=3).map("\n".join)


@given(st.lists(st.tuples(TEXT, TEXT, st.integers(0, 2)), min_size=1, max_size=4))
def test_translated_pairs_stay_pairs(rows: list[tuple[str, str, int]]):
    given_examples, expected = [], []
    for number, (first, second, label) in enumerate(rows):
        for made, parts in ((given_examples, (first, second)), (expected, (lines_said(first), lines_said(second)))):
            text, cut = join(*parts)
            made.append(Example(key=str(number), text=text, cut=cut, label=label))
    assert moved(*given_examples) == expected


@given(TEXT, LINE, st.lists(st.just("") | LINE, min_size=4, max_size=4), st.integers(0, 3))
def test_translated_choices_stay_choices(passage: str, question: str, choices: list[str], label: int):
    example = compose("7", passage, question, choices, label)
    (found,) = moved(example)
    assert (found.key, found.label) == ("7", label)
    assert found.cut == (0, len(lines_said(passage)))
    spans = [said(f"{number} {choice}") for number, choice in enumerate(choices, start=1)]
    assert [found.text[start:end] for start, end in found.spans] == spans
    assert found.text == "\n".join([lines_said(passage) + said(f" {question}"), *spans])
    found.check(found.text)


@st.composite
def questions(draw) -> Example:
    """As XQuAD's: the passage is the span and what may be cut; answers lie in it, in any order, one in another too."""
    question, passage = draw(LINE), draw(TEXT)
    text, start = f"{question}\n{passage}", len(question) + 1
    place = st.integers(start, len(text))
    answers = draw(st.lists(st.tuples(place, place).map(sorted).map(tuple), min_size=1, max_size=3, unique=True))
    return Example(key="q", text=text, spans=((start, len(text)),), answers=tuple(answers), cut=(start, len(text)))


@given(questions())
def test_translated_answers_stay_answers(example: Example):
    """An answer becomes what its pieces become, cut where any answer begins or ends."""
    (found,) = moved(example)
    edges = {0, len(example.text), *example.spans[0], *(edge for answer in example.answers for edge in answer)}

    def expected(start: int, end: int) -> str:
        inside = sorted(edge for edge in edges if start <= edge <= end)
        return "".join(lines_said(example.text[first:last]) for first, last in zip(inside, inside[1:]))

    assert found.text == expected(0, len(example.text))
    for name in ("spans", "answers"):
        given_ranges, moved_ranges = getattr(example, name), getattr(found, name)
        assert [found.text[start:end] for start, end in moved_ranges] == [expected(*each) for each in given_ranges]
    assert found.cut == found.spans[0] == (len(said(example.text.split("\n")[0])) + 1, len(found.text))
    found.check(found.text)


def test_only_what_has_letters_is_translated():
    shouting = Shouting()
    pairs = [join("a b", "12.5"), join("  \n", "c\r\nd"), join("?!", "a b")]
    made, _ = translate_examples(
        [Example(key=str(number), text=text, cut=cut) for number, (text, cut) in enumerate(pairs)],
        shouting,
        source="swh_Latn",
    )
    assert sorted(shouting.asked) == ["a b", "a b", "c", "d"]
    assert [example.text for example in made] == ["<A B>!\n12.5", "  \n\n<C>!\r\n<D>!", "?!\n<A B>!"]
