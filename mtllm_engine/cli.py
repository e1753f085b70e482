"""The `mtllm` command."""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from mtllm_engine.config import load
from mtllm_engine.data import shards, sources
from mtllm_engine.files import expand, expanded_path
from mtllm_engine.languages import FLORES_200, NAMES, SCRIPTS, check_code
from mtllm_engine.progress import warn


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. What the user can mend is one line on stderr."""
    parser = _build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # overrides on the other side of an option, which argparse does not collect by itself
        if "overrides" not in arguments or any(item.startswith("-") for item in rest):
            arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides = [*arguments.overrides, *rest]
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # who read has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        print("mtllm: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Tells a mistake in one line, as `main` does, without the usage before it."""
        self.exit(2, f"mtllm: error: {message}; see {self.prog} --help\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Keeps as `parser` the command's own, which says what it takes."""
        arguments, rest = super().parse_known_args(args, namespace)
        arguments.parser = getattr(arguments, "parser", self)  # the innermost comes first
        return arguments, rest


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mtllm")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_launched(commands)
    _add_recipes(commands)
    _add_checks(commands)
    _add_sum(commands)
    _add_encode(commands)
    _add_show(commands)
    _add_export(commands)
    _add_shards(commands)
    _add_models(commands)
    _add_languages(commands)
    _add_babel(commands)
    return parser


def _add_launched(commands: argparse._SubParsersAction) -> None:
    """What runs on one node's GPUs or on CPU ranks."""
    for name, summary in (
        ("train", "distil: stage 1, or stage 2 from a fine-tuned LLM"),
        ("finetune", "teach the LLM (or the stack) a task in English"),
        ("targets", "store the teacher's states beside the corpora"),
        ("evaluate", "every system in every language, into one table"),
    ):
        parser = commands.add_parser(name, help=summary)
        parser.add_argument("config", type=expand, metavar="CONFIG", help="TOML file")
        parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
        parser.add_argument(
            "--gpus", type=int, metavar="N", help="ranks on this node (default: 1)", default=1
        )
        if name in ("train", "finetune"):
            parser.add_argument(
                "--dry-run",
                action="store_true",
                help="make one step, say what it took, and leave nothing",
            )
        parser.set_defaults(run=_launch, command=name, dry_run=False)


def _launch(arguments: argparse.Namespace) -> int:
    """Becomes `deepspeed --num_gpus N --module MODULE ...`, with a port of its own."""
    command, gpus = arguments.command, arguments.gpus
    words = [arguments.config, *arguments.overrides]
    # Mistakes are told here, once and all of them, and not by every rank.
    if not _is_sound(command, words, gpus):
        return 1
    if not arguments.dry_run:
        _become(f"mtllm_engine.{command}", gpus, words)
    if command == "finetune":
        reader = load(*words[:1], words[1:], finetunes=True).objective.reader
        words += [f"objective.reader={reader}", "objective.kind=finetune"]
    _become("mtllm_engine.dry_run", gpus, words)


def _is_sound(command: str, words: Sequence[str], gpus: int = 1) -> bool:
    """Whether a command can start; what is wrong is told, a fault a line."""
    from mtllm_engine.validate import validate

    report = validate(words[0], words[1:], command=command, gpus=gpus)
    for kind in ("warning", "error"):
        for line in report.warnings if kind == "warning" else report.problems:
            print(f"mtllm: {kind}: {line}", file=sys.stderr)
    return not report.problems


def _become(module: str, gpus: int, words: Sequence[str]) -> NoReturn:
    """Replaces this process by the launcher of a module's ranks."""
    # Imports torch, like all that this file's functions import.
    from mtllm_engine.training.launch import launcher

    command = launcher(module, gpus)
    sys.stdout.flush()
    # Ctrl-C is for the ranks, which save first: the launcher waits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.execv(sys.executable, [*command, *words])


def _add_recipes(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser("run", help="the whole method from one file, going on where it broke")
    run.add_argument("recipe", type=expand, metavar="RECIPE", help="TOML file")
    run.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    run.set_defaults(run=_run_recipe)
    sweep = commands.add_parser(
        "sweep", help="a recipe at every combination of settings: quality against compute"
    )
    sweep.add_argument("recipe", type=expand, metavar="RECIPE", help="TOML file")
    sweep.add_argument("overrides", nargs="+", metavar="section.key=a,b")
    sweep.set_defaults(run=_sweep)


def _run_recipe(arguments: argparse.Namespace) -> int:
    from mtllm_engine import recipe

    if not _is_sound("run", [arguments.recipe, *arguments.overrides]):
        return 1
    return recipe.run(recipe.load(arguments.recipe, arguments.overrides))


def _sweep(arguments: argparse.Namespace) -> int:
    from mtllm_engine import sweep

    # The first of all settings; what another one's values change, `sweep` looks at itself.
    first = sweep.first_setting(arguments.overrides)
    if not _is_sound("run", [arguments.recipe, *first]):
        return 1
    return sweep.sweep(arguments.recipe, arguments.overrides)


def _add_checks(commands: argparse._SubParsersAction) -> None:
    validate = commands.add_parser(
        "validate", help="say all that is wrong with a configuration or recipe, or what it would do"
    )
    validate.add_argument("config", type=expand, metavar="CONFIG", help="TOML file")
    validate.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    validate.add_argument(
        "--for",
        dest="command",
        default="",
        choices=["train", "finetune", "targets", "evaluate"],
        help="what a configuration is for (default: by what is in it)",
    )
    validate.add_argument(
        "--gpus", type=int, metavar="N", default=1, help="ranks on this node (default: 1)"
    )
    validate.set_defaults(run=_validate)
    plan = commands.add_parser(
        "plan", help="say what a configuration or recipe will take on GPUs, here or elsewhere"
    )
    plan.add_argument("config", type=expand, metavar="CONFIG", help="TOML file, a recipe's too")
    plan.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    kinds = "a100-40, a100-80, h100, h200, b200, l40s or 4090 (default: the one that is here)"
    plan.add_argument("--gpu", default="", metavar="NAME", help=kinds)
    of_node = "GPUs of a node (default: 1; of a recipe its own)"
    plan.add_argument("--gpus", type=int, metavar="N", help=of_node)
    plan.add_argument("--nodes", type=int, default=1, metavar="M", help="default: 1")
    plan.set_defaults(run=_plan)
    doctor = commands.add_parser("doctor", help="say whether this machine can train, and how")
    doctor.add_argument(
        "--json", action="store_true", help="for a bug report: it names no person and no place"
    )
    doctor.set_defaults(run=_doctor)


def _validate(arguments: argparse.Namespace) -> int:
    from mtllm_engine.validate import validate

    options = {"command": arguments.command, "gpus": arguments.gpus}
    report = validate(arguments.config, arguments.overrides, **options, describe=True)
    for kind in ("warning", "error"):
        for line in report.warnings if kind == "warning" else report.problems:
            print(f"mtllm: {kind}: {line}", file=sys.stderr)
    if report.problems:
        return 1
    from mtllm_engine.training.log import print_table

    print("ready")
    print_table(report.header)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from mtllm_engine.plan import plan

    options = {"gpu": arguments.gpu, "gpus": arguments.gpus, "nodes": arguments.nodes}
    print(plan(arguments.config, arguments.overrides, **options))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from mtllm_engine import doctor

    findings = doctor.examine()
    print(doctor.as_json(findings) if arguments.json else doctor.as_text(findings))
    return 0 if all(each.ok for each in findings if each.is_needed) else 1


def _add_sum(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sum", help="add up stage 1's adapters and a fine-tuned LLM's: a stack that knows the task"
    )
    parser.add_argument(
        "parts",
        nargs="+",
        type=expand,
        metavar="CHECKPOINT",
        help="of a run, or a folder of PEFT's, over one LLM",
    )
    parser.add_argument("--out", required=True, type=expanded_path, metavar="DIR")
    parser.set_defaults(run=_sum)


def _sum(arguments: argparse.Namespace) -> int:
    from mtllm_engine.training.origins import add_up

    lora = add_up(arguments.parts, arguments.out)
    adapters = f"adapters of rank {lora.rank} on {', '.join(lora.target_modules)}"
    print(f"{arguments.out}: {adapters}")
    return 0


def _add_encode(commands: argparse._SubParsersAction) -> None:
    """The names of what is typed are those of `encode.Request`."""
    for name, summary in (
        ("encode", "vectors of the texts of a file"),
        ("classify", "labels of the texts of a file, or of pairs of texts"),
    ):
        parser = commands.add_parser(name, help=summary)
        kinds = f"{', '.join(sources.INPUT_SUFFIXES)}; - for standard input, a text a line"
        parser.add_argument("source", type=expand, metavar="INPUT", help=kinds)
        models = "run, checkpoint, sum, exported folder or hub id"
        parser.add_argument("--model", required=True, type=expand, metavar="X", help=models)
        parser.add_argument("--language", metavar="CODE", help="of the texts, such as swh_Latn")
        parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU, if any")
        types = ["bfloat16", "float32"]
        parser.add_argument("--dtype", choices=types, help="of the models; default: as trained")
        parser.add_argument(
            "--max-tokens", type=int, default=4096, metavar="N", help="of a batch (default: 4096)"
        )
        parser.add_argument(
            "--gpus", type=int, default=1, metavar="N", help="ranks on this node (default: 1)"
        )
        _add_places(parser)
        parser.set_defaults(run=_encode, command=name)
        (_add_vectors if name == "encode" else _add_labels)(parser)


def _add_places(parser: argparse.ArgumentParser) -> None:
    for model in ("encoder", "decoder"):
        moved = f"the {model} that X was trained with, where it lies elsewhere now"
        parser.add_argument(f"--{model}", default="", type=expand, metavar="DIR", help=moved)
    moved = "an adapter of model.adapters, likewise; once for each, in order"
    options = {"action": "append", "default": [], "type": expand, "metavar": "DIR"}
    parser.add_argument("--merged", help=moved, **options)


def _places(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("encoder", "decoder", "merged")}


def _add_vectors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, type=expand, metavar="FILE", help=".npy or .parquet"
    )
    parser.add_argument(
        "--field",
        dest="fields",
        type=lambda field: [field],
        default=["text"],
        help="column, or dotted path in a JSON line (default: text)",
    )
    parser.add_argument(
        "--reader",
        choices=["student", "teacher"],
        default="student",
        help="teacher: what the stack learned to be like, the LLM on its own tokens",
    )
    parser.add_argument("--normalize", action="store_true", help="vectors of length 1")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        default="",
        type=expand,
        metavar="FILE",
        help=".jsonl or .parquet (default: lines of label, probability and text are printed)",
    )
    parser.add_argument(
        "--field",
        dest="fields",
        type=lambda field: field.split(","),
        default=["text"],
        help="as for encode; of a task that compares two texts two, as premise,hypothesis",
    )
    parser.add_argument("--task", default="", metavar="NAME", help="which one, of several")
    parser.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        type=_named_path,
        default=[],
        metavar="NAME=CHECKPOINT",
        help="a fine-tuned LLM, whose task is added",
    )


def _encode(arguments: argparse.Namespace) -> int:
    """Alone in this process, or by the ranks of a launch."""
    from mtllm_engine import encode

    request = encode.Request.of(vars(arguments))
    request.check(arguments.gpus)
    if arguments.gpus == 1:
        return encode.run_alone(request)
    return _become("mtllm_engine.encode", arguments.gpus, [json.dumps(asdict(request))])


def _add_show(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("show", help="say what a run, checkpoint, sum or export holds")
    parser.add_argument("model", type=expand, metavar="X")
    _add_places(parser)
    parser.set_defaults(run=_show_trained)


def _show_trained(arguments: argparse.Namespace) -> int:
    from mtllm_engine.show import show

    print(show(arguments.model, **_places(arguments)))
    return 0


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export", help="what was trained as a folder for transformers and others"
    )
    parser.add_argument(
        "name", type=expand, metavar="X", help="run, checkpoint, sum, recipe's or exported folder"
    )
    parser.add_argument("--out", required=True, type=expanded_path, metavar="DIR")
    parser.add_argument(
        "--format", default="folder", help="folder (default), adapters, llm or authors"
    )
    parser.add_argument(
        "--dtype", default="", help="of the two models' weights: float32 or bfloat16"
    )
    parser.add_argument(
        "--merge", action="store_true", help="put the adapters into the LLM's weights"
    )
    parser.add_argument(
        "--language", default="", metavar="CODE", help="of texts whose language nobody says"
    )
    parser.add_argument(
        "--task",
        dest="tasks",
        action="append",
        default=[],
        type=_named_path,
        metavar="NAME=CHECKPOINT",
        help="a fine-tuned LLM's, to travel along",
    )
    parser.add_argument(
        "--push", default="", metavar="REPO", help="on the hub; a new one is private"
    )
    _add_places(parser)
    parser.set_defaults(run=_export)


def _named_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"write NAME=CHECKPOINT, not {text!r}")
    return name, expand(path)


def _export(arguments: argparse.Namespace) -> int:
    from mtllm_engine.export import export

    out = export(
        arguments.name,
        arguments.out,
        format=arguments.format,
        dtype=arguments.dtype,
        merge=arguments.merge,
        push=arguments.push,
        default_language=arguments.language,
        tasks=dict(arguments.tasks),
        **_places(arguments),
    )
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {num_bytes / 1e9:.2f} GB")
    return 0


def _add_shards(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("shards", help="make, import, check and show corpora")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    pack = actions.add_parser("pack", help="make a corpus from text, JSONL or Parquet")
    pack.add_argument(
        "inputs",
        nargs="+",
        type=expanded_path,
        metavar="INPUT",
        help=f"folder, or a file that ends in {', '.join(sources.INPUT_SUFFIXES)}",
    )
    pack.add_argument("--out", required=True, type=expanded_path, metavar="DIR")
    pack.add_argument(
        "--field", default="text", help="column, or dotted path in a JSON line (default: text)"
    )
    pack.add_argument(
        "--shards", default=8, type=int, metavar="N", help="number of shards (default: 8)"
    )
    pack.add_argument(
        "--on-error", default="raise", choices=["raise", "skip"], help="for documents without text"
    )
    pack.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        help="such as 0.01: two corpora, DIR/train and DIR/validation, with no text in both",
    )
    pack.set_defaults(run=_pack)

    import_ = actions.add_parser("import", help="write the manifest of a folder of WebDataset tars")
    import_.add_argument("folder", type=expanded_path, metavar="DIR")
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
        action.add_argument("folder", type=expanded_path, metavar="DIR")
        action.set_defaults(run=run)


def _add_models(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("models", help="take in what others trained")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    import_ = actions.add_parser(
        "import",
        help="make a model's folder of a GGUF file, or a checkpoint of the paper's authors' layout",
    )
    import_.add_argument(
        "source", type=expand, metavar="X", help="FILE.gguf; or their folder or hub id"
    )
    import_.add_argument("--out", required=True, type=expanded_path, metavar="DIR")
    import_.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of GGUF's weights in DIR (default: float32, which rounds none)",
    )
    import_.add_argument(
        "--layers", default=0, type=int, metavar="N", help="of GGUF's the first N (default: all)"
    )
    import_.add_argument(
        "--base",
        default="",
        type=expand,
        metavar="DIR",
        help="the LLM that the authors' own began with",
    )
    import_.add_argument(
        "--rank", default=16, type=int, metavar="N", help="of the adapters (default: 16)"
    )
    import_.set_defaults(run=_import_model)

    check = actions.add_parser("check", help="say whether an encoder and an LLM fit one another")
    check.add_argument("encoder", type=expand, metavar="ENCODER", help="folder or hub id")
    check.add_argument("llm", type=expand, metavar="LLM", help="folder or hub id")
    check.add_argument(
        "--adapters",
        dest="merged",
        nargs="+",
        default=[],
        type=expand,
        metavar="DIR",
        help="PEFT's, folders or hub ids, to be merged into the LLM in this order",
    )
    check.set_defaults(run=_check_models)


def _import_model(arguments: argparse.Namespace) -> int:
    if arguments.source.endswith(".gguf"):
        from mtllm_engine.models import import_gguf

        dtype = arguments.dtype or "float32"
        options = {"dtype": dtype, "layers": arguments.layers}
        count = import_gguf(Path(arguments.source), arguments.out, **options)
        print(f"{arguments.out}: {count:,} weights in {dtype}")
        return 0
    for option in ("layers", "dtype"):
        if getattr(arguments, option):
            fix = f"leave out --{option}"
            raise ValueError(f"--{option} is for a file FILE.gguf, not {arguments.source}; {fix}")
    from mtllm_engine.export.authors import adapters_from

    rank = arguments.rank
    left = adapters_from(arguments.source, arguments.base, arguments.out, rank=rank)
    print(f"{arguments.out}: adapters of rank {rank}; of the linears' differences they leave out")
    for kind, share in left.items():
        print(f"  {kind:<9}  {share:.2e}")
    return 0


def _check_models(arguments: argparse.Namespace) -> int:
    from mtllm_engine.models import check
    from mtllm_engine.training.log import print_table

    found = check(arguments.encoder, arguments.llm, arguments.merged)
    print_table(found.rows)
    for problem in found.problems:
        print("mtllm: error:", problem, file=sys.stderr)
    return 1 if found.problems else 0


def _add_languages(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "languages", help="list FLORES-200's and benchmarks' languages, and which an encoder has"
    )
    parser.add_argument(
        "--encoder",
        type=expand,
        metavar="DIR",
        help="folder or hub id of an encoder and its tokenizer",
    )
    parser.set_defaults(run=_languages)


def _languages(arguments: argparse.Namespace) -> int:
    """One line each: code, name, script; with an encoder whether it has the language, and its
    others at the end.
    """
    from mtllm_engine.data.vocabulary import read_languages  # imports transformers

    encoder = arguments.encoder
    known = read_languages(_tokenizer_at(encoder)).codes if encoder else frozenset()
    for code, name in NAMES.items():
        row = [code, f"{name:<24}", SCRIPTS[code[4:]]]
        if arguments.encoder:
            row.insert(1, "yes" if code in known else "no ")
        print("  ".join(row + ["not in FLORES-200"] * (code not in FLORES_200)))
    for code in sorted(known - set(NAMES)):
        print(f"{code}  yes  not in FLORES-200")
    return 0


def _tokenizer_at(encoder: str) -> str:
    """A folder, or a hub id that the hub has: else its client would try for a minute."""
    from mtllm_engine.model import hub

    if Path(encoder).exists():
        return encoder
    fetched = hub.look(encoder)
    return str(fetched) if fetched and (fetched / "tokenizer_config.json").exists() else encoder


def _checked(language: str) -> str:
    """A corpus' language, told where few encoders have it: it may be misspelled."""
    if check_code(language) not in FLORES_200:
        who = "only an encoder with a token of that name, or one that takes none, reads it"
        warn(f"{language} is none of FLORES-200's languages: {who}")
    return language


def _pack(arguments: argparse.Namespace) -> int:
    report = sources.pack(
        arguments.inputs,
        arguments.out,
        field=arguments.field,
        language=_checked(arguments.language),
        shards=arguments.shards,
        licence=arguments.licence,
        on_error=arguments.on_error,
        held_out=arguments.held_out,
    )
    _tell(report)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    report = shards.import_shards(
        arguments.folder,
        language=_checked(arguments.language),
        field=arguments.field,
        licence=arguments.licence,
    )
    _tell(report, skipped="not usable")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    problems = shards.verify(arguments.folder)
    print("\n".join(problems) or f"{arguments.folder} is sound")
    return 1 if problems else 0


def _show(arguments: argparse.Namespace) -> int:
    print(shards.show(arguments.folder))
    return 0


def _add_babel(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "babel", help="a synthetic multilingual land with two tiny trained models"
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="write its texts and benchmarks, train its models")
    build.add_argument("folder", type=expanded_path, metavar="DIR")
    build.add_argument(
        "--size", default="small", metavar="SIZE", help="small or medium (default: small)"
    )
    build.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another seed, another land (default: 0)"
    )
    build.set_defaults(run=_build_babel)


def _build_babel(arguments: argparse.Namespace) -> int:
    from mtllm_engine import babel  # imports torch, transformers and sentencepiece

    print(babel.table(babel.build(arguments.folder, arguments.size, arguments.seed)))
    return 0


def _tell(report: shards.CorpusReport, skipped: str = "skipped") -> None:
    """Prints what there is now, and what is not in it.

    Args:
        skipped: What documents without usable text are called.
    """
    corpora = {report.path: report.manifest}
    if report.validation:
        corpora[report.path.with_name(sources.VALIDATION)] = report.validation
    for path, manifest in corpora.items():
        num_bytes = sum(shard.bytes for shard in manifest.shards)
        documents = f"{manifest.samples} {manifest.language} documents"
        count = len(manifest.shards)
        print(f"{path}: {documents} in {count} shard{'' if count == 1 else 's'}, {num_bytes} bytes")
    for name, counts in (
        (skipped, report.skipped),
        ("repeated", report.repeated),
        ("files left out", report.left_out),
    ):
        for reason, count in sorted(counts.items()):
            print(f"  {name} {count}: {reason}")
    if report.validation:
        train, validation = corpora
        words = shlex.join([f"data.train={train}", f"validation.corpus={validation}"])
        print(f"train with both: mtllm train CONFIG {words}")


if __name__ == "__main__":
    sys.exit(main())
