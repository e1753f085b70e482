import math
import tomllib
import typing
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_engine import recipe
from mtllm_engine.config import LORA_TARGETS, Config, dumps, flatten, from_dict, load
from mtllm_engine.data.languages import FLORES_200

CONFIGS = Path(__file__).parent.parent / "configs"
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
NAME = st.text(min_size=1)  # any characters: TOML can spell them all
BY_TYPE = {bool: st.booleans(), str: st.text(), int: st.integers(1, 1 << 40), float: POSITIVE}
BY_KEY = {  # where the type alone allows more
    "run.dir": NAME,
    "run.seed": st.integers(0, 2**63 - 1),
    "lora.dropout": SHARE,
    "lora.targets": st.lists(st.sampled_from(LORA_TARGETS), unique=True),
    "data.train": st.lists(NAME, min_size=2, max_size=2),
    "data.weights": st.just([]) | st.lists(POSITIVE, min_size=2, max_size=2),
    "data.pack_documents": st.integers(1, 1 << 20),
    "data.pack_tokens": st.just(0),
    "data.max_length": st.integers(4, 1 << 20),
    "data.targets": st.just(""),  # as the keys of fine-tuning below: with others only
    "objective.kind": st.just("distil"),
    "objective.reader": st.just("stack"),
    "objective.token_weight": SHARE,
    "task.train": st.just(""),
    "task.validation": st.just(""),
    "task.test": st.just([]),
    "evaluate.systems": st.lists(st.sampled_from(["llm", "translate_test", "stack"]), min_size=1),
    "evaluate.languages": st.lists(NAME),
    "probe.split": NAME,
    "probe.languages": st.lists(NAME),
    "optim.epochs": st.just(0),
    "optim.warmup": SHARE,
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
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
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
    """Any valid configuration, as nested dictionaries; keys that have a default are there or not."""
    tree = {}
    for key in HINTS:
        section, _, name = key.partition(".")
        table = tree.setdefault(section, {})
        if name in SMALLEST.get(section, {}) or key == "memory.max_tokens" or draw(st.booleans()):
            table[name] = draw(values(key))
    if tree["model"].get("base", "full") != "full":
        tree["zero"]["stage"] = 0  # a quantised base is not sharded
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
    assert (config.optim.steps, config.optim.lr, config.lora.rank, config.lora.alpha) == (10_000, 2e-4, 16, 32.0)


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
        assert str(error).startswith((f"{key} ", f"{key}[0] ", f"{key}: ")) and "\n" not in str(error)
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
        ("data.weights=2", "data.weights must be a list, not 2"),
        ("model.dtype=fp16", "model.dtype must be one of 'bfloat16', 'float32', not 'fp16'"),
        ("zero.stage=1", "zero.stage must be one of 0, 3, not 1"),
        ("zero.stage=false", "zero.stage must be one of 0, 3, not False"),
        ("lora=3", "lora must be a section, not 3"),
        ("deepspeed=3", "deepspeed must be a table, not 3"),
        ("run.dir.name=3", "run.dir.name: dir is not a section"),
        ("optim.lr", "not an override: 'optim.lr'; write section.key=value, such as optim.lr=1e-4"),
        ("=3", "not an override: '=3'; write section.key=value, such as optim.lr=1e-4"),
        ("optim..lr=3", "not an override: 'optim..lr=3'; write section.key=value, such as optim.lr=1e-4"),
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
        "run.validate_every=0",
        "lora.rank=0",
        "lora.alpha=0",
        "lora.dropout=1",
        "lora.dropout=-0.1",
        "lora.targets=[lm_head]",
        "lora.targets=lm_head",
        "data.train=[]",
        "data.weights=[1, 2]",
        "data.weights=[0]",
        "data.lanes=0",
        "data.pack_documents=0",
        "data.pack_documents=-1",
        "data.pack_tokens=1024",
        "data.pack_tokens=-1",
        "data.max_length=3",
        "data.prefetch=0",
        "optim.steps=0",
        "optim.lr=0",
        "optim.warmup=1",
        "optim.warmup=-0.1",
        "optim.betas=[1.0, 0.9]",
        "optim.betas=[0.9, -0.1]",
        "optim.eps=0",
        "optim.weight_decay=-1",
        "optim.clip=-1",
        "memory.max_tokens=2047",
        "languages.fallback={indonesian = 'ind_Latn'}",
        "languages.fallback.nij_Latn=ind",
        "languages.fallback.nij_Latn=bbc_Latn",
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
    one_by_one = override("languages.fallback.nij_Latn=ind_Latn", "languages.fallback.qab_Latn=qaa_Latn")
    assert table.languages.fallback == one_by_one.languages.fallback == expected


def test_text_beside_a_tasks_is_for_stage_2_alone(override):
    beside = ["task.name=nli", "task.train=mnli:data", "data.train=[fineweb]"]
    assert override(*beside, "data.weights=[1, 2]").data.weights == (1.0, 2.0)
    assert "after one for task.train" in message_of(override, *beside, "data.weights=[1]")
    message = message_of(override, *beside, "objective.kind=finetune")
    assert message.startswith("data.train has no labels to fine-tune on beside task.train; leave it empty, or")


def test_packs_that_can_hold_no_document_or_no_micro_batch(override):
    packs = ["data.pack_documents=0", "data.pack_tokens=100"]
    assert "data.pack_tokens=100 cannot hold data.max_length=512" in message_of(override, *packs)
    assert override(*packs, "data.max_length=100").data.pack_tokens == 100
    assert "raise memory.max_tokens=99" in message_of(override, *packs, "data.max_length=100", "memory.max_tokens=99")


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
        ("data.validation=", "data.validation", ""),
        ("data.train=corpora/a", "data.train", ("corpora/a",)),
        ("data.train=['a', 'b']", "data.train", ("a", "b")),
        ("model.causal=true", "model.causal", True),
        (" optim.lr = 1 ", "optim.lr", 1.0),
    ],
)
def test_override(override_, key, value, override):
    found = flatten(override(override_))[key]
    assert found == value and type(found) is type(value)


def test_later_overrides_win_and_new_sections_appear(override):
    config = override("optim.lr=1", "optim.lr=2", "checkpoint.keep=9")
    assert (config.optim.lr, config.checkpoint.keep) == (2.0, 9)


def test_deepspeed_table_is_passed_through(override, tmp_path):
    table = "[deepspeed]\nzero_optimization = { zero_hpz_partition_size = 8 }\nwall_clock_breakdown = true\n"
    text = dumps(from_dict(SMALLEST)).replace("[deepspeed]\n", table)
    config = read(text, "deepspeed.zero_optimization.offload=['cpu']", "deepspeed.new.x=1e400", folder=tmp_path)
    zero = {"zero_hpz_partition_size": 8, "offload": ["cpu"]}
    assert config.deepspeed == {"zero_optimization": zero, "wall_clock_breakdown": True, "new": {"x": math.inf}}
    assert read(dumps(config), folder=tmp_path) == config


def test_missing_keys_are_listed(tmp_path):
    assert message_of(from_dict, {}) == "missing key: run, model, data"
    tree = SMALLEST | {"model": {}}
    assert message_of(from_dict, tree) == "missing key: model.encoder, model.decoder"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[run", "is not valid TOML"), (b"\xff", "is not valid TOML"), (None, "cannot read the config")],
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
