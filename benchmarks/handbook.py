"""Every key of a configuration, as configs/README.md shows it: written there from the docstrings of
config.py; and what `mtllm plan` says of the presets (`plans`).

    python -m benchmarks.handbook
"""

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from pathlib import Path

from benchmarks import plans
from mtllm_engine.config import Config, dumps, from_dict

HANDBOOK = Path(__file__).resolve().parent.parent / "configs" / "README.md"
START = "<!-- From here on written by `python -m benchmarks.handbook`. -->\n"
END = "<!-- Up to here. -->\n"
SMALLEST = {  # a configuration that is valid
    "run": {"dir": "DIR"},
    "model": {"encoder": "DIR", "decoder": "DIR"},
    "data": {"train": ["DIR"], "pack_documents": 1},
    "optim": {"steps": 1},
}


def main() -> int:
    """Writes the handbook's keys and the presets' plans anew."""
    text = plans.with_example(written(HANDBOOK.read_text("utf-8")))
    HANDBOOK.write_text(text, "utf-8")
    plans.write()
    return 0


def written(handbook: str) -> str:
    """The handbook with the keys that there are now."""
    before, _, rest = handbook.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{keys()}\n{END}{after}"


def keys() -> str:
    """A heading and a table for each section."""
    hints = typing.get_type_hints(Config)
    tables = [_section(key, cls) for key, cls in hints.items() if dataclasses.is_dataclass(cls)]
    others = [f"### `[{key}]`\n\n{text}\n" for key, text in _docstrings(Config).items()]
    return "\n".join([*tables, *others])


def _section(name: str, cls: type) -> str:
    texts, defaults, hints = _docstrings(cls), _defaults(name, cls), typing.get_type_hints(cls)
    lines = [f"### `[{name}]`", "", _one_line(cls.__doc__ or ""), ""]
    lines += ["| key | default | what it is |", "|---|---|---|"]
    lines += [
        f"| `{key}` | {defaults[key]} | {texts[key]}{_choices(hints[key])} |" for key in texts
    ]
    return "\n".join([*lines, ""])


def _choices(hint: object) -> str:
    """What a key may be, where that is a few words."""
    is_several = typing.get_origin(hint) is tuple
    item = typing.get_args(hint)[0] if is_several else hint
    if typing.get_origin(item) is not typing.Literal:
        return ""
    words = [f'`"{each}"`' if isinstance(each, str) else f"`{each}`" for each in item.__args__]
    return f" {'Any' if is_several else 'One'} of {', '.join(words)}."


def _defaults(name: str, cls: type) -> Mapping[str, str]:
    """By key, as a TOML file has them."""
    section = getattr(from_dict(SMALLEST), name)
    has_default = {
        item.name: item.default is not dataclasses.MISSING
        or item.default_factory is not dataclasses.MISSING
        for item in dataclasses.fields(cls)
    }
    needed = {key: getattr(section, key) for key, known in has_default.items() if not known}
    config = dataclasses.replace(from_dict(SMALLEST), **{name: cls(**needed)})
    (table,) = re.findall(
        rf"^\[{name}\]\n(.*?)\n(?:\n|\Z)", dumps(config), re.DOTALL | re.MULTILINE
    )
    values = dict(line.split(" = ", 1) for line in table.splitlines())
    return {key: f"`{values[key]}`" if known else "needed" for key, known in has_default.items()}


def _docstrings(cls: type) -> Mapping[str, str]:
    """What stands below each key that has a text of its own."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for statement, below in zip(definition.body, definition.body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            texts[statement.target.id] = _one_line(ast.literal_eval(below.value))
    return texts


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


if __name__ == "__main__":
    raise SystemExit(main())
