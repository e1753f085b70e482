"""The `mtllm` command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtllm_engine.data import shards
from mtllm_engine.data.languages import check_language


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. What the user can mend is one line on stderr."""
    arguments = _build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print("mtllm: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mtllm")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_shards(commands)
    return parser


def _add_shards(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("shards", help="make, import, check and show corpora")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    pack = actions.add_parser("pack", help="make a corpus from text, JSONL or Parquet")
    pack.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=f"folder or {shards.INPUT_SUFFIXES}")
    pack.add_argument("--out", required=True, type=Path, metavar="DIR")
    pack.add_argument("--field", default="text", help="column, or dotted path in a JSON line (default: text)")
    pack.add_argument("--shards", default=8, type=int, metavar="N", help="number of shards (default: 8)")
    pack.add_argument("--on-error", default="raise", choices=["raise", "skip"], help="for documents without text")
    pack.set_defaults(run=_pack)

    import_ = actions.add_parser("import", help="write the manifest of a folder of WebDataset tars")
    import_.add_argument("folder", type=Path, metavar="DIR")
    import_.add_argument("--field", default="txt", help="extension, or json.PATH (default: txt)")
    import_.set_defaults(run=_import)

    for action in (pack, import_):
        action.add_argument("--language", required=True, help="FLORES-200 code, such as eng_Latn")
        action.add_argument("--licence", default="unknown")
    for name, run, summary in (
        ("verify", _verify, "check every shard and document against the manifest"),
        ("show", _show, "say what a corpus holds"),
    ):
        action = actions.add_parser(name, help=summary)
        action.add_argument("folder", type=Path, metavar="DIR")
        action.set_defaults(run=run)


def _pack(arguments: argparse.Namespace) -> int:
    report = shards.pack(
        arguments.inputs,
        arguments.out,
        field=arguments.field,
        language=check_language(arguments.language),
        shards=arguments.shards,
        licence=arguments.licence,
        on_error=arguments.on_error,
    )
    print(_summary(report.path, report.manifest))
    for reason, count in sorted(report.skipped.items()):
        print(f"  skipped {count}: {reason}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    manifest = shards.import_shards(
        arguments.folder,
        language=check_language(arguments.language),
        field=arguments.field,
        licence=arguments.licence,
    )
    print(_summary(arguments.folder, manifest))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    problems = shards.verify(arguments.folder)
    print("\n".join(problems) or f"{arguments.folder} is sound")
    return 1 if problems else 0


def _show(arguments: argparse.Namespace) -> int:
    print(shards.show(arguments.folder))
    return 0


def _summary(path: Path, manifest: shards.Manifest) -> str:
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    documents = f"{manifest.samples} {manifest.language} documents"
    return f"{path}: {documents} in {len(manifest.shards)} shards, {num_bytes} bytes"


if __name__ == "__main__":
    sys.exit(main())
