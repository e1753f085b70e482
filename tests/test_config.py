"""A configuration: what arrives, what is refused and how, what is expanded, renamed, documented."""

import argparse
import ast
import inspect
import math
import re
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine import cli, recipe
from mtllm_engine import config as config_module
from mtllm_engine.config import (
    LORA_TARGETS,
    RENAMED,
    Config,
    PathText,
    dumps,
    flatten,
    from_dict,
    load,
)
from mtllm_engine.languages import FLORES_200
from mtllm_engine.train import train
from tests.support.machine import ROOT
from tests.support.recipes import write_recipe
from tests.support.tiny import build_world

CONFIGS = ROOT / "configs"
SMALLEST = {
    "run": {"dir": "runs/a"},
    "model": {"encoder": "nllb", "decoder": "llama"},
    "data": {"train": ["fineweb"], "pack_documents": 4},
    "optim": {"steps": 10},
}


def read(text, *overrides, folder):
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load(path, overrides)


@pytest.fixture
def override(tmp_path):
    """Loads the smallest configuration with overrides."""
    return lambda *overrides: read(dumps(from_dict(SMALLEST)), *overrides, folder=tmp_path)


def message_of(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


HINTS = {
    f"{section}.{name}": hint
    for section, table in typing.get_type_hints(Config).items()
    if is_dataclass(table)
    for name, hint in typing.get_type_hints(table).items()
}
POSITIVE = st.floats(min_value=1e-30, max_value=1e30)
SHARE = st.floats(0, 1, exclude_max=True)
# All that TOML can spell but for "~", which is a home folder.
CHARACTERS = st.characters(exclude_characters="~", exclude_categories=["Cs"])
TEXT, NAME = st.text(CHARACTERS), st.text(CHARACTERS, min_size=1)
FILE_NAME = st.from_regex(r"\w[\w.+-]{0,40}", fullmatch=True)
BY_TYPE = {bool: st.booleans(), str: TEXT, int: st.integers(1, 1 << 40), float: POSITIVE}
BY_KEY = {  # where the type alone allows more
    "run.dir": NAME,
    "model.init_from": st.lists(NAME, max_size=3),
    "lora.train": st.just("all"),  # "first" is of a sum
    "run.seed": st.integers(0, 2**63 - 1),
    "lora.dropout": SHARE,
    "lora.target_modules": st.lists(st.sampled_from(LORA_TARGETS), unique=True),
    "data.train": st.lists(NAME, min_size=2, max_size=2),
    "data.mixture": st.just([]) | st.lists(POSITIVE, min_size=2, max_size=2),
    "data.pack_documents": st.integers(1, 1 << 20),
    "data.pack_tokens": st.just(0),
    "data.max_length": st.integers(4, 1 << 20),
    "data.pairs": st.just(0) | SHARE,
    "data.teacher_states": st.just(""),  # as the keys of fine-tuning below: with others only
    "objective.kind": st.just("distil"),
    "objective.reader": st.just("stack"),
    "objective.token_weight": SHARE,
    "task.train": st.just(""),
    "task.validation": st.just(""),
    "task.test": st.just([]),
    "evaluate.systems": st.lists(
        st.sampled_from(["llm", "translate_test", "sum", "stack"]), min_size=1
    ),
    "evaluate.stage1": st.lists(NAME),
    "model.adapters": st.lists(NAME),
    "evaluate.languages": st.lists(FILE_NAME),
    "evaluate.stack_name": FILE_NAME,
    "probe.split": FILE_NAME,
    "probe.languages": st.lists(NAME),
    "optim.epochs": st.just(0),
    "optim.warmup_ratio": SHARE,
    "optim.betas": st.lists(SHARE, min_size=2, max_size=2),
    "optim.weight_decay": st.just(0) | POSITIVE,
    "optim.clip": st.just(0) | POSITIVE,
    "memory.max_tokens": st.integers(1 << 40, 1 << 41),
    "languages.fallback": st.dictionaries(
        st.from_regex(r"[a-z]{3}_[A-Z][a-z]{3}", fullmatch=True), st.sampled_from(FLORES_200)
    ),
}
FREE = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3)
    ),
    max_leaves=6,
)


def values(key):
    """A strategy for valid values of a key."""
    if key in BY_KEY:
        return BY_KEY[key]
    if typing.get_origin(HINTS[key]) is typing.Literal:
        return st.sampled_from(typing.get_args(HINTS[key]))
    return BY_TYPE[HINTS[key]]


@st.composite
def trees(draw):
    """Any valid configuration as nested dictionaries, with some of the keys that have defaults."""
    tree = {}
    for key in HINTS:
        section, _, name = key.partition(".")
        table = tree.setdefault(section, {})
        if name in SMALLEST.get(section, {}) or key == "memory.max_tokens" or draw(st.booleans()):
            table[name] = draw(values(key))
    if tree["zero"].get("secondary", "none") != "none":
        tree["zero"]["stage"] = 3  # only what is sharded can be held once more
    return tree | {"deepspeed": draw(st.dictionaries(st.text(), FREE, max_size=3))}


@given(trees())
def test_dumps_round_trip(tmp_path_factory, tree):
    config = from_dict(tree)
    assert read(dumps(config), folder=tmp_path_factory.mktemp("config")) == config


@given(trees())
def test_values_arrive_where_they_were_put(tree):
    config = from_dict(tree)
    assert config.deepspeed == tree.pop("deepspeed")
    flat = flatten(config)
    for section, table in tree.items():
        for name, value in table.items():
            assert flat[f"{section}.{name}"] == (tuple(value) if isinstance(value, list) else value)


def test_shipped_configs_load(tmp_path):
    configs, recipes = {}, {}
    for path in CONFIGS.rglob("*.toml"):
        if "[recipe]" in path.read_text():
            recipes[path.stem] = recipe.load(path)
        else:
            configs[path.stem] = load(path)
    assert {"paper_stage1", "nllb600m_llama3_8b"} <= configs.keys() and "quickstart" in recipes
    jobs = [job.config for each in recipes.values() for job in each.jobs]
    for config in [*configs.values(), *jobs]:
        assert read(dumps(config), folder=tmp_path) == config


def test_paper_config_is_the_papers_run():
    config = load(CONFIGS / "paper_stage1.toml")
    assert config.data.lanes * config.data.pack_documents == 256
    assert (config.optim.steps, config.optim.lr) == (10_000, 2e-4)
    assert (config.lora.rank, config.lora.alpha) == (16, 32.0)
    parts = "facebook/nllb-200-distilled-600M", "meta-llama/Meta-Llama-3-8B-Instruct"
    assert (config.model.encoder, config.model.decoder) == parts
    llm2vec = "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp"
    assert config.model.adapters == (llm2vec, f"{llm2vec}-unsup-simcse")


@pytest.mark.parametrize("key", HINTS)
def test_unknown_key_suggests_the_known_one(key, override):
    typo = key + key[-1]
    assert message_of(override, f"{typo}=1") == f"unknown key: {typo}; did you mean {key}?"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optimm.lr", "unknown key: optimm; did you mean optim?"),
        ("lr", "unknown key: lr; did you mean optim.lr?"),
        ("train.lr", "unknown key: train; did you mean data.train?"),
        ("data.lr", "unknown key: data.lr; did you mean optim.lr?"),
        ("zero.qqq", "unknown key: zero.qqq"),
    ],
)
def test_suggestion_looks_in_all_sections(typed, meant, override):
    assert message_of(override, f"{typed}=1") == meant


@pytest.mark.parametrize("key", HINTS)
@pytest.mark.parametrize("value", ["{ a = 1 }", "[[1]]", "true", "2.5", "'?'"])
def test_ill_typed_value_names_its_key(key, value, override):
    """Each key takes at most one of these kinds, and then says so or keeps the value."""
    section, _, name = key.partition(".")
    try:
        config = override(f"{key}={value}")
    except ValueError as error:
        message = str(error)
        assert message.startswith((f"{key} ", f"{key}[0] ", f"{key}: ")) and "\n" not in message
    else:
        expected = tomllib.loads(f"value = {value}")["value"]
        assert getattr(getattr(config, section), name) in (expected, (expected,))
        assert type(expected) is not dict


@pytest.mark.parametrize(
    ("override_", "message"),
    [
        ("optim.steps=1.5", "optim.steps must be a whole number, not 1.5"),
        ("optim.steps=true", "optim.steps must be a whole number, not True"),
        ("optim.lr=true", "optim.lr must be a number, not True"),
        ("optim.lr=fast", "optim.lr must be a number, not 'fast'"),
        ("optim.lr=nan", "optim.lr must be finite, not nan"),
        ("optim.betas=[0.9]", "optim.betas must have 2 values, not 1"),
        ("optim.betas=[0.9, '1']", "optim.betas[1] must be a number, not '1'"),
        ("model.causal=no", "model.causal must be true or false, not 'no'"),
        ("run.dir=3", "run.dir must be a string, not 3"),
        ("data.mixture=2", "data.mixture must be a list, not 2"),
        ("model.dtype=fp16", "model.dtype must be one of 'bfloat16', 'float32', not 'fp16'"),
        ("zero.stage=1", "zero.stage must be one of 'auto', 0, 3, not 1"),
        ("zero.stage=false", "zero.stage must be one of 'auto', 0, 3, not False"),
        ("lora=3", "lora must be a section, not 3"),
        ("deepspeed=3", "deepspeed must be a table, not 3"),
        ("run.dir.name=3", "run.dir.name: dir is not a section"),
        ("optim.lr", "not an override: 'optim.lr'; write section.key=value, such as optim.lr=1e-4"),
        ("=3", "not an override: '=3'; write section.key=value, such as optim.lr=1e-4"),
        (
            "run.dir=a\udcff",
            r"not UTF-8, so no configuration can hold it: 'run.dir=a\udcff'",
        ),
        (
            "optim..lr=3",
            "not an override: 'optim..lr=3'; write section.key=value, such as optim.lr=1e-4",
        ),
    ],
)
def test_error_names_the_key_and_the_fix(override_, message, override):
    assert message_of(override, override_).startswith(message)


@pytest.mark.parametrize(
    "out_of_range",
    [
        "run.dir=",
        "run.seed=-1",
        "run.seed=9223372036854775808",
        "run.log_every=0",
        "validation.every=0",
        "lora.rank=0",
        "lora.alpha=0",
        "lora.dropout=1",
        "lora.dropout=-0.1",
        "lora.target_modules=[lm_head]",
        "lora.target_modules=lm_head",
        "data.train=[]",
        "data.mixture=[1, 2]",
        "data.mixture=[0]",
        "data.lanes=0",
        "data.pack_documents=0",
        "data.pack_documents=-1",
        "data.pack_tokens=1024",
        "data.pack_tokens=-1",
        "data.max_length=3",
        "data.prefetch=0",
        "optim.steps=0",
        "optim.lr=0",
        "optim.warmup_ratio=1",
        "optim.warmup_ratio=-0.1",
        "optim.betas=[1.0, 0.9]",
        "optim.betas=[0.9, -0.1]",
        "optim.eps=0",
        "optim.weight_decay=-1",
        "optim.clip=-1",
        "memory.max_tokens=2047",
        "languages.fallback={indonesian = 'ind_Latn'}",
        "languages.fallback.nij_Latn=ind",
        "languages.fallback.nij_Latn=swa_Latn",
        "languages.fallback.nij_Latn=1",
        "checkpoint.every=0",
        "checkpoint.keep=0",
    ],
)
def test_out_of_range_names_the_key(out_of_range, override):
    assert out_of_range.partition("=")[0] in message_of(override, out_of_range)


def test_fallbacks_are_declared_as_a_table_or_one_by_one(override):
    expected = {"nij_Latn": "ind_Latn", "qab_Latn": "qaa_Latn"}
    table = override('languages.fallback={nij_Latn = "ind_Latn", qab_Latn = "qaa_Latn"}')
    each = ("languages.fallback.nij_Latn=ind_Latn", "languages.fallback.qab_Latn=qaa_Latn")
    one_by_one = override(*each)
    assert table.languages.fallback == one_by_one.languages.fallback == expected


def test_text_beside_a_tasks_is_for_stage_2_alone(override):
    beside = ["task.name=nli", "task.train=mnli:data", "data.train=[fineweb]"]
    assert override(*beside, "data.mixture=[1, 2]").data.mixture == (1.0, 2.0)
    assert "after one for task.train" in message_of(override, *beside, "data.mixture=[1]")
    message = message_of(override, *beside, "objective.kind=finetune")
    start = "data.train has no labels to fine-tune on beside task.train; leave it empty, or"
    assert message.startswith(start)


def test_packs_that_can_hold_no_document_or_no_micro_batch(override):
    packs = ["data.pack_documents=0", "data.pack_tokens=100"]
    assert "data.pack_tokens=100 cannot hold data.max_length=512" in message_of(override, *packs)
    assert override(*packs, "data.max_length=100").data.pack_tokens == 100
    small = ["data.max_length=100", "memory.max_tokens=99"]
    assert "raise memory.max_tokens=99" in message_of(override, *packs, *small)


@pytest.mark.parametrize("text", ["3e-4", "0.0003", "3.0E-4", " 3e-4 ", "+3e-4"])
def test_lr_is_a_number(text, override):
    assert override(f"optim.lr={text}").optim.lr == 3e-4


@pytest.mark.parametrize(
    ("override_", "key", "value"),
    [
        ("lora.alpha=8", "lora.alpha", 8.0),
        ("optim.steps=10_000", "optim.steps", 10_000),
        ("run.dir=runs/a b#c", "run.dir", "runs/a b#c"),
        ("run.dir='3'", "run.dir", "3"),
        ("run.dir=2030-01-31", "run.dir", "2030-01-31"),
        ("run.dir=a=b", "run.dir", "a=b"),
        ("run.dir=runs/été", "run.dir", "runs/été"),
        ("validation.corpus=", "validation.corpus", ""),
        ("data.train=corpora/a", "data.train", ("corpora/a",)),
        ("data.train=['a', 'b']", "data.train", ("a", "b")),
        ("model.causal=true", "model.causal", True),
        (" optim.lr = 1 ", "optim.lr", 1.0),
    ],
)
def test_override(override_, key, value, override):
    overridden = flatten(override(override_))[key]
    assert overridden == value and type(overridden) is type(value)


def test_later_overrides_win_and_new_sections_appear(override):
    config = override("optim.lr=1", "optim.lr=2", "checkpoint.keep=9")
    assert (config.optim.lr, config.checkpoint.keep) == (2.0, 9)


def test_deepspeed_table_is_passed_through(override, tmp_path):
    keys = "zero_optimization = { reduce_bucket_size = 8 }\nwall_clock_breakdown = true\n"
    text = dumps(from_dict(SMALLEST)).replace("[deepspeed]\n", f"[deepspeed]\n{keys}")
    overrides = ["deepspeed.zero_optimization.offload=['cpu']", "deepspeed.new.x=1e400"]
    config = read(text, *overrides, folder=tmp_path)
    zero = {"reduce_bucket_size": 8, "offload": ["cpu"]}
    expected = {"zero_optimization": zero, "wall_clock_breakdown": True, "new": {"x": math.inf}}
    assert config.deepspeed == expected
    assert read(dumps(config), folder=tmp_path) == config


def test_missing_keys_are_listed(tmp_path):
    assert message_of(from_dict, {}) == "missing key: run, model, data"
    tree = SMALLEST | {"model": {}}
    assert message_of(from_dict, tree) == "missing key: model.encoder, model.decoder"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[run", "is not valid TOML"),
        (b"\xff", "is not valid TOML"),
        (None, "cannot read the config"),
    ],
)
def test_unreadable_file_is_named(content, message, tmp_path):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    assert message_of(load, path).startswith((f"{path} {message}", f"{message} {path}"))


def test_configs_are_frozen_and_comparable():
    config = from_dict(SMALLEST)
    assert config == from_dict(SMALLEST) and isinstance(config, Config)
    with pytest.raises(AttributeError):
        config.optim.lr = 1.0


OLD_KEYS = sorted(RENAMED)


@pytest.mark.parametrize("key", OLD_KEYS)
def test_an_old_key_is_an_error_that_names_the_new_one(key, override, tmp_path):
    """On the command line and in a file."""
    expected = f"unknown key: {key}; it is {RENAMED[key]} now"
    assert message_of(override, f"{key}=1") == expected
    section, _, name = key.rpartition(".")
    line = f"{name or key} = 1\n"
    text = dumps(from_dict(SMALLEST))
    text = text.replace(f"[{section}]\n", f"[{section}]\n{line}") if section else line + text
    assert message_of(lambda: read(text, folder=tmp_path)) == expected


@pytest.mark.parametrize("key", OLD_KEYS)
def test_what_an_old_key_is_now_is_a_key(key):
    now = re.match(r"[\w.]+", RENAMED[key]).group()
    assert now in HINTS or now in recipe.TABLES
    assert key not in HINTS and key not in recipe.TABLES


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("distil.optim.epochs=5", "stage1: unknown key: distil; it is stage2 now"),
        ("model.start=x", "stage1: unknown key: model.start; it is model.init_from now"),
        ("stage2.run.validate_every=5", "unknown key: run.validate_every; it is validation.every"),
    ],
)
def test_an_old_key_of_a_recipe_is_an_error_too(old, message, tmp_path):
    assert message in message_of(lambda: recipe.load(write_recipe(tmp_path), [old]))


PATHS = {
    f"{section}.{name}": hint
    for section, table in typing.get_type_hints(Config).items()
    if is_dataclass(table)
    for name, hint in typing.get_type_hints(table, include_extras=True).items()
    if PathText in (hint, *typing.get_args(hint))
}
NO_PATHS = {  # texts of other kinds
    "model.encoder_prefix",
    "task.name",
    "lora.target_modules",
    "data.teacher_states",
    "languages.fallback",
    "evaluate.languages",
    "evaluate.stack_name",
    "probe.languages",
    "probe.split",
}
HOME = "/home/of somebody"


@pytest.fixture(scope="module", autouse=True)
def home():
    """`~` is HOME."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", HOME)
        yield


def arrived(key: str, value: str) -> object:
    """What a configuration holds where a path was put."""
    section, _, name = key.partition(".")
    tree = SMALLEST | {"task": {"name": "nli"}}
    items = [value, "other"] if typing.get_origin(PATHS[key]) is tuple else value
    return flatten(from_dict(tree | {section: tree.get(section, {}) | {name: items}}))[key]


def test_every_text_is_a_path_or_known_to_be_none():
    texts = {key for key, hint in HINTS.items() if str in (hint, *typing.get_args(hint))}
    assert texts == PATHS.keys() | NO_PATHS and not PATHS.keys() & NO_PATHS


@given(
    key=st.sampled_from(sorted(PATHS)),
    dataset=st.sampled_from(["", "mnli:", "belebele_training:", "x-1.0+:"]),
    rest=st.text(),
)
def test_a_home_is_expanded_in_every_path(key, dataset, rest):
    expected = f"{dataset}{HOME}/{rest}"
    assert arrived(key, f"{dataset}~/{rest}") in (expected, (expected, "other"))


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("value", ["facebook/nllb", "/a/~/b", "a~", "a/~b", "mnli:a/~", "a b:~/c"])
def test_what_is_no_home_stays_as_it_is(key, value):
    assert arrived(key, value) in (value, (value, "other"))


def test_a_home_is_expanded_in_a_recipe(tmp_path):
    overrides = ["recipe.dir=~/out", "model.encoder=~/nllb", "task.train=mnli:~/mnli"]
    loaded = recipe.load(write_recipe(tmp_path), overrides)
    assert str(loaded.folder) == f"{HOME}/out"
    for job in loaded.jobs:
        assert job.config.run.dir == f"{HOME}/out/{job.name}"
        assert job.config.model.encoder == f"{HOME}/nllb"
        assert job.config.task.train in ("", f"mnli:{HOME}/mnli")


def command_words(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """What takes a text, of a command and all below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in set(action.choices.values()):
                yield from command_words(below)
        elif action.nargs != 0 and action.type not in (int, float) and not action.choices:
            yield action


NO_PATH_WORDS = {"overrides", "field", "fields", "language", "licence", "size", "task"}
NO_PATH_WORDS |= {"format", "dtype", "push", "gpu"}
NAMED = {"adapters", "tasks"}  # NAME=PATH


def test_a_home_is_expanded_in_every_path_of_a_command_line():
    words = list(command_words(cli._build_parser()))
    paths = [action for action in words if action.dest not in NO_PATH_WORDS]
    assert {action.dest for action in words} - {action.dest for action in paths} == NO_PATH_WORDS
    assert {action.dest for action in paths} >= {"config", "recipe", "inputs", "out", "folder"}
    for action in paths:
        assert action.type is not None, action.dest
        if action.dest in NAMED:
            assert action.type("a=~/x y") == ("a", f"{HOME}/x y")
            continue
        assert str(action.type("~/x y")) == f"{HOME}/x y" and str(action.type("a/~")) == "a/~"


def test_a_home_is_expanded_nowhere_else():
    """Who reads a path need not think of it."""
    files = [*(ROOT / "mtllm_engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    expanding = [path for path in files if "expanduser" in path.read_text()]
    assert [path.relative_to(ROOT / "mtllm_engine").name for path in expanding] == ["files.py"]


FINETUNING = """
[run]
dir = "runs/a"
[model]
encoder = "nllb"
decoder = "llama"
[task]
name = "nli"
train = "mnli:data"
[data]
pack_documents = 4
[optim]
steps = 10
"""


@pytest.mark.parametrize(
    ("objective", "reader"),
    [
        ({}, "llm"),
        ({"reader": "stack"}, "stack"),
        ({"reader": "llm"}, "llm"),
        ({"kind": "distil"}, "llm"),
        ({"kind": "distil", "reader": "stack"}, "stack"),
        ({"kind": "finetune"}, "llm"),
    ],
)
def test_fine_tuning_sets_the_kind_and_is_the_llms_by_default(objective, reader, tmp_path):
    """Whatever kind stands in the file; a reader that stands there wins."""
    table = "".join(f"{key} = '{value}'\n" for key, value in objective.items())
    path = tmp_path / "run.toml"
    path.write_text(f"{FINETUNING}[objective]\n{table}")
    loaded = load(path, finetunes=True).objective
    assert (loaded.kind, loaded.reader) == ("finetune", reader)
    overridden = load(path, ["objective.reader=stack"], finetunes=True).objective
    assert (overridden.kind, overridden.reader) == ("finetune", "stack")


def test_training_refuses_to_fine_tune(tmp_path):
    config = read(FINETUNING, "objective.kind=finetune", folder=tmp_path)
    message = message_of(train, config, build_world())
    assert message == 'objective.kind = "finetune": that is `mtllm finetune`, this distils'


def test_evaluation_is_no_kind_of_training(override):
    message = message_of(override, "objective.kind=evaluate")
    assert message == "objective.kind must be one of 'distil', 'finetune', not 'evaluate'"


TABLES = [Config, *typing.get_type_hints(Config).values()]


@pytest.mark.parametrize("table", filter(is_dataclass, TABLES), ids=lambda table: table.__name__)
def test_every_key_says_what_it_is(table):
    """Below it, or where it is a section in its class: the handbook is made of that."""
    (definition,) = ast.parse(inspect.getsource(table)).body
    assert ast.get_docstring(definition).endswith(".")
    hints = typing.get_type_hints(table)
    for statement, below in zip(definition.body, [*definition.body[1:], None]):
        if isinstance(statement, ast.AnnAssign) and not is_dataclass(hints[statement.target.id]):
            assert isinstance(below, ast.Expr), statement.target.id
            assert ast.literal_eval(below.value).endswith("."), statement.target.id


def test_other_programs_words_name_ours():
    known = {key.rpartition(".")[2] for key in config_module._dotted_keys(config_module.Config)}
    for word, here in config_module.USUAL.items():
        assert word not in known
        for key in re.findall(r"\b[a-z]+\.[a-z_]+", here):
            assert key in set(config_module._dotted_keys(config_module.Config)), key
        for dotted in (word, f"optim.{word}", f"model.{word}"):
            assert (
                str(config_module.unknown_key(dotted))
                == f"unknown key: {dotted}; here it is {here}"
            )


def test_a_pack_that_is_too_large_names_what_makes_it():
    packs = {"pack_documents": 4, "max_length": 8192}
    with pytest.raises(ValueError, match="^data.pack_documents=4 x data.max_length=8192: a pack"):
        from_dict(SMALLEST | {"data": SMALLEST["data"] | packs})
    with pytest.raises(ValueError, match="^data.pack_tokens=20000: a pack may have 20000 tokens"):
        from_dict(SMALLEST | {"data": {"train": ["a"], "pack_tokens": 20000}})


def test_another_programs_word_for_a_required_key_is_its_only_fault():
    problems = config_module.examine(SMALLEST | {"run": {"output_dir": "runs/a"}}).problems
    assert problems == ("unknown key: run.output_dir; here it is run.dir",)
