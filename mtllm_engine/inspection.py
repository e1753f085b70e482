"""One configuration, looked at for a command: all that is wrong with it, before anything is loaded.

Of models and checkpoints only configurations, tokenizers and the headers of weights' files are
read, of corpora only the manifests. What merely follows from another fault is not named: a question
is asked where all that it stands on was found sound. Large libraries are imported where a question
needs them.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mtllm_engine.config import Config, Examined, flatten
from mtllm_engine.data.shards import Manifest
from mtllm_engine.doctor import gigabytes, memory_bytes
from mtllm_engine.languages import ENGLISH

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mtllm_engine.data.encoder_languages import EncoderLanguages
    from mtllm_engine.data.tokenizers import PairTokenizer
    from mtllm_engine.model.families import DecoderSpec
    from mtllm_engine.model.stack import Stack
    from mtllm_engine.tasks import Task
    from mtllm_engine.world import World

T = TypeVar("T")
SAVED_BYTES = 12  # of a trained number in a checkpoint: itself and two moments, in fp32


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a rank needs by the estimate, and what there is for it; in bytes."""

    held: int
    """Of it by weights and what is trained."""
    needed: int
    there: int
    where: str
    max_tokens: int

    def refusal(self) -> str:
        what = f"the weights and what is trained take {gigabytes(self.held)}"
        fix = "use more GPUs, model.quantization or a smaller model"
        return f"memory: {what}, and {self.where} has {gigabytes(self.there)}; {fix}"

    def warning(self) -> str:
        fix = f'lower memory.max_tokens={self.max_tokens}, or set memory.recompute = "layer"'
        return f"memory: {self.row()}; if it does not do, {fix}"

    def row(self) -> str:
        return (
            f"estimated {gigabytes(self.needed)} of {gigabytes(self.there)} that {self.where} has"
        )


class Inspection:
    """One configuration, looked at for a command.

    Args:
        made_in: A recipe's folder: what its steps make there is not there yet.
    """

    def __init__(
        self, examined: Examined, command: str, gpus: int, *, made_in: Path | None = None
    ) -> None:
        self.config, self.knows = examined.config, examined.knows
        self.problems, self.warnings = list(examined.problems), list[str]()
        self.command, self.gpus, self.made_in = command.rpartition(".")[2], gpus, made_in
        self.task: Task | None = None
        self.to_fetch: list[str] = []
        self.stack: Stack | None = None
        self.tokenizer: PairTokenizer | None = None
        self.memory: Memory | None = None
        self.layout = ""
        self.disk_bytes = 0

    def looked(self) -> "Inspection":
        """Itself, once everything has been looked at."""
        self._look_at_launch()
        self._look_at_folder()
        corpora = list(self._corpora())
        self._look_at_task()
        languages = self._look_at_models()
        self._look_at_languages(corpora, languages)
        if self.command == "evaluate":
            self._look_at_tests()
        return self

    def ask(self, question: Callable[[], T], *keys: str, name: str = "") -> T | None:
        """The answer; None where a key that it is about has a fault already, or where the answer is
        one, which is kept.

        Args:
            name: Of the key, where the error does not name it.
        """
        return ask(self.problems, question, name) if self.knows(*keys) else None

    def _look_at_launch(self) -> None:
        """What ranks must be like."""
        config, gpus = self.config, self.gpus
        if gpus < 1:
            self.problems.append(f"--gpus must be at least 1, not {gpus}")
        lanes = f"{gpus} ranks need at least as many data.lanes; there are {config.data.lanes}"
        kind = 'objective.kind = "finetune": that is `mtllm finetune`, this distils'
        states = "data.teacher_states is empty: name the states that are to be written"
        finetunes = config.objective.kind == "finetune"
        for is_wrong, message, *keys in (
            (gpus > config.data.lanes, lanes, "data.lanes"),
            (self.command == "train" and finetunes, kind, "objective.kind"),
            (
                self.command == "targets" and not config.data.teacher_states,
                states,
                "data.teacher_states",
            ),
        ):
            if is_wrong and self.knows(*keys):
                self.problems.append(message)
        if config.deepspeed:
            from mtllm_engine.training.engine import check_deepspeed

            for table in _single(config.deepspeed):
                self.ask(lambda table=table: check_deepspeed(table), "deepspeed")

    def _look_at_folder(self) -> None:
        """Whether something can be written where the run lies."""
        place = nearest_folder(Path(self.config.run.dir))
        if not self.knows("run.dir"):
            return
        if not place.is_dir():
            self.problems.append(f"run.dir: {place} is a file; choose another folder")
        elif not os.access(place, os.W_OK | os.X_OK):
            self.problems.append(f"run.dir: nothing can be written into {place}; choose another")
        elif not shutil.disk_usage(place).total:  # as /proc and /sys are
            self.problems.append(f"run.dir: {place} is no place for files; choose another folder")

    def _corpora(self) -> Iterator[tuple[str, Path, Manifest]]:
        """(key, folder, manifest) of each corpus that is there and whole."""
        data, held_out = self.config.data, self.config.validation.corpus
        named = [("data.train", each) for each in data.train]
        named += [("validation.corpus", held_out)] if held_out else []
        if self.command == "evaluate":
            return
        for key, name in named:
            folder = Path(name)
            if self._is_made(name) or not self.knows(key):
                continue
            manifest = self.ask(lambda folder=folder: Manifest.load(folder), name=key)
            if manifest is None or not self._are_shards_there(key, folder, manifest):
                continue
            few = f"{folder} has {manifest.samples} documents, fewer than data.lanes={data.lanes}"
            if key == "data.train" and manifest.samples < data.lanes and self.knows("data.lanes"):
                self.problems.append(few)
            self._look_for_states(folder)
            yield key, folder, manifest

    def _are_shards_there(self, key: str, folder: Path, manifest: Manifest) -> bool:
        """By their sizes; what is in them is hashed when they are read."""
        fix = "restore it, run `mtllm shards import` again, or set data.on_error=skip"
        for shard in manifest.shards if self.config.data.on_error == "raise" else ():
            path = folder / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                said = f"has {size} bytes, and {shard.bytes} in the manifest" if size else "is lost"
                self.problems.append(f"{key}: {path} {said}; {fix}")
                return False
        return True

    def _look_for_states(self, corpus: Path) -> None:
        states = self.config.data.teacher_states
        if states and self.command == "train" and self.made_in is None:
            from mtllm_engine.data.teacher_states import TeacherStates

            self.ask(lambda: TeacherStates(corpus, states, {}), "data.teacher_states")

    def _look_at_task(self) -> None:
        config, task = self.config, self.config.task
        if not task.name or not self.knows("task.name"):
            return
        from mtllm_engine.tasks import find_dataset, load_task

        self.task = found = self.ask(lambda: load_task(task.name), name="task.name")
        if found is None:
            return
        for split in ("train", "validation"):
            source = getattr(task, split)

            def read(source: str = source, split: str = split) -> None:
                dataset, folder = find_dataset(found, source)
                examples = dataset.read(folder, split, ENGLISH)
                lanes = config.data.lanes if split == "train" and self.knows("data.lanes") else 0
                # No further than that: the files may be large.
                count = sum(1 for _ in itertools.islice(examples, lanes))
                if count < lanes and self.command != "evaluate":
                    few = f"{source} has {count} examples, fewer than data.lanes={lanes}"
                    raise ValueError(f"task.{split}: {few}")

            if source:
                self.ask(read, f"task.{split}", name=f"task.{split}")
        for source in task.test:
            self.ask(lambda source=source: find_dataset(found, source), name="task.test")
        if self.command in ("train", "targets") and found.head == "span":
            from mtllm_engine.train import find_task

            self.ask(lambda: find_task(config), "objective.kind")

    def _look_at_models(self) -> "EncoderLanguages | None":
        """Both models, one by one and together; returns what the encoder can be told."""
        config, before = self.config, len(self.problems)
        folders = {
            key: self._folder(f"model.{key}", getattr(config.model, key))
            for key in ("encoder", "decoder")
        }
        chain = [self._folder("model.adapters", name) for name in config.model.adapters]
        origins = self._look_at_checkpoints()
        encoder, spec, languages = None, None, None
        if folders["encoder"]:
            encoder, languages = self._encoder(folders["encoder"])
        if folders["decoder"]:
            spec = self._decoder(folders["decoder"])
        if any(folders.values()):
            self._look_at_machine()
        if encoder and spec:
            self._look_together(encoder, spec)
        settled = self._settled() if spec and origins else None
        is_whole = encoder and spec and all(chain) and not self.to_fetch
        if is_whole and settled and len(self.problems) == before:
            self._build(settled, encoder, spec)
        return languages

    def _settled(self) -> Config | None:
        """The configuration with the adapters that it leaves open."""
        from mtllm_engine.model.build import check_adapters, settle
        from mtllm_engine.model.weights import checkpoint_tensors

        config = self.config
        if self.command == "evaluate":  # each system has adapters of its own
            config = replace(config, model=replace(config.model, init_from=(), teacher=""))
        keys = [f"lora.{each}" for each in ("rank", "alpha", "rslora", "target_modules")]
        keys += ["model.init_from", "model.decoder"]
        settled = self.ask(lambda: settle(config), *keys)
        if settled and len(config.model.init_from) == 1:
            start = Path(config.model.init_from[0])
            if start.exists():
                self.ask(lambda: check_adapters(settled, checkpoint_tensors(start)), *keys)
        return settled

    def _folder(self, key: str, name: str) -> Path | None:
        """Where a model lies; nothing is fetched."""

        def find() -> Path | None:
            if os.path.exists(name):
                from mtllm_engine.model.tensors import resolve

                return resolve(name)
            from mtllm_engine.model import hub

            folder = hub.look(name)
            has_weights = folder and [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
            self.to_fetch += [] if has_weights or name in self.to_fetch else [name]
            return folder

        return self.ask(find, key, name=key)

    def _encoder(self, folder: Path) -> "tuple[PreTrainedConfig | None, EncoderLanguages | None]":
        from mtllm_engine.data.vocabulary import read_languages
        from mtllm_engine.model.build import read_encoder
        from mtllm_engine.model.tensors import TensorFiles

        read = self.ask(lambda: read_encoder(folder), name="model.encoder")
        if read is None:  # so neither are its files an encoder's
            return None, None
        languages = self.ask(lambda: read_languages(folder), name="model.encoder")
        if self.config.model.encoder not in self.to_fetch:
            self.ask(lambda: TensorFiles(folder), name="model.encoder")
        return read, languages

    def _decoder(self, folder: Path) -> "DecoderSpec | None":
        from mtllm_engine.data.vocabulary import load_tokenizer
        from mtllm_engine.model.families import decoder_spec, read_config
        from mtllm_engine.model.merge import find_adapters
        from mtllm_engine.model.tensors import TensorFiles

        key = "model.decoder"
        spec = self.ask(lambda: decoder_spec(read_config(folder, key), f"{key}: {folder}"))
        if spec:  # or neither are its files an LLM's
            self.ask(lambda: load_tokenizer(folder), name=key)
            if self.config.model.decoder not in self.to_fetch:
                self.ask(lambda: TensorFiles(folder), name=key)
        for name in self.config.model.adapters:
            if os.path.exists(name):
                self.ask(lambda name=name: find_adapters(name), "model.adapters")
        return spec

    def _look_at_machine(self) -> None:
        """What of the machine the models ask for."""
        import torch

        from mtllm_engine.kernels.attention import select
        from mtllm_engine.kernels.lora_linear import check_available
        from mtllm_engine.world import device_type

        model, device = self.config.model, device_type()
        self.ask(lambda: select(model.attention, device), "model.attention")
        form, dtype = model.quantization, getattr(torch, model.dtype)
        available = (form, torch.device(device), dtype)
        self.ask(lambda: check_available(*available), "model.quantization", "model.dtype")
        if device == "cuda" and self.gpus > torch.cuda.device_count():
            count = f"this machine has {torch.cuda.device_count()} GPUs"
            self.problems.append(f"{self.gpus} ranks need a GPU each, and {count}")

    def _look_together(self, encoder: "PreTrainedConfig", spec: "DecoderSpec") -> None:
        from mtllm_engine.model.build import check_configs

        keys = ("data.max_length", "model.causal", "model.encoder", "model.decoder")
        self.ask(lambda: check_configs(self.config, encoder, spec), *keys)

    def _look_at_checkpoints(self) -> bool:
        """Whether all that is started from is there."""
        given = self.config.model
        if not (given.init_from or given.teacher or self.config.evaluate.stage1):
            return True
        from mtllm_engine.training import checkpoint

        followed, is_whole = checkpoint.follow(self.config), True
        model = followed.model
        for key, names in (
            ("model.init_from", model.init_from),
            ("model.teacher", (model.teacher,) if model.teacher else ()),
            ("evaluate.stage1", followed.evaluate.stage1),
        ):
            for name in names if self.knows(key) else ():
                is_whole &= not self._is_made(name) and self._is_there(key, name)
        return is_whole

    def _is_there(self, key: str, name: str) -> bool:
        """Whether a checkpoint is one; what else is wrong with it is told."""
        from mtllm_engine.model.weights import PROJECTION_FILE, checkpoint_tensors
        from mtllm_engine.training.origins import check_origin

        before, model, folder = len(self.problems), self.config.model, Path(name)
        if not folder.exists():
            from mtllm_engine.model.hub import HUB_ID

            if "/" in name and HUB_ID.fullmatch(name):
                folder = self._folder(key, name) or folder
                if name in self.to_fetch:
                    return False
        if len(self.problems) == before:
            self.ask(lambda: checkpoint_tensors(folder), name=key)
        is_there = len(self.problems) == before
        if is_there and (folder / "state.json").exists():
            current: dict[str, Any] = {"model.causal": model.causal}
            names: dict[str, Any] = {"model.causal": model.causal}
            if key != "model.teacher" and (folder / PROJECTION_FILE).is_file():
                current["model.encoder_prefix"] = model.encoder_prefix
                names["model.encoder_prefix"] = repr(model.encoder_prefix)
            keys = ("model.causal", "model.encoder_prefix")
            self.ask(lambda: check_origin(folder, current, names), *keys, name=key)
        return is_there

    def _is_made(self, path: str) -> bool:
        """Whether a step of the recipe makes it."""
        return self.made_in is not None and Path(path).is_relative_to(self.made_in)

    def _build(self, settled: Config, encoder: "PreTrainedConfig", spec: "DecoderSpec") -> None:
        """The stack on the meta device: whether every tensor is there and fits, and its sizes."""
        from mtllm_engine.model.build import build_stack, build_tokenizer

        keys = ("objective.kind", "objective.reader", "task.name", "lora", "model")
        is_known = self.knows(*keys, "data.max_length", "data.truncation", "data.parts")
        if not is_known or (self.config.task.name and not self.task):
            return
        head = self.task.head_size if self.task else None
        built = self.ask(lambda: build_stack(settled, head=head))
        if built is None:
            return
        tokenizer = self.ask(lambda: build_tokenizer(settled, built[0]))
        self.stack, self.tokenizer, self.settled = built[0], tokenizer, settled
        self._look_at_sizes(encoder, spec)
        if self.command in ("train", "finetune"):
            self._look_at_earlier(settled)

    def _look_at_sizes(self, encoder: "PreTrainedConfig", spec: "DecoderSpec") -> None:
        from mtllm_engine.training import layout, memory
        from mtllm_engine.world import device_type

        config = self.settled
        if self.gpus < 1 or not self.knows("memory", "data", "zero"):
            return
        sizes = [memory_bytes()] if device_type() == "cuda" else []

        def estimate() -> list[memory.Row]:
            about = {"encoder": encoder, "decoder": spec, "world_size": self.gpus}
            needed = partial(layout.needed_bytes, config, **about)
            chosen = layout.choose(config, self.gpus, sizes, needed)
            self.layout = chosen.words
            if chosen.stage == layout.WHOLE and config.deepspeed:
                self.warnings.append(f"weights are {chosen.words}; set zero.stage=3 to use it")
            settled = replace(config, zero=replace(config.zero, stage=chosen.stage))
            return memory.estimate(settled, encoder, spec, self.gpus)

        rows = self.ask(estimate)  # DeepSpeed's table is read for it
        if rows is None:
            return
        held, needed, there = memory.held(rows), memory.total(rows), memory_bytes()
        where = "a GPU"
        if device_type() == "cpu":  # which all ranks share
            held, needed = self.gpus * held, self.gpus * (needed - memory.ASSUMED)
            where = "this machine"
        options = {"there": there, "where": where, "max_tokens": config.memory.max_tokens}
        self.memory = Memory(held=held, needed=needed, **options)
        trained = sum(each.numel() for each in self.stack.parameters() if each.requires_grad)
        # The newest, the best one, and one that is being written.
        copies = (config.checkpoint.keep + 2) * SAVED_BYTES * trained
        earlier = Path(config.run.dir).glob("checkpoints/step-*/*")
        self.disk_bytes = max(0, copies - sum(each.stat().st_size for each in earlier))
        if self.command not in ("train", "finetune"):
            self.disk_bytes = 0

    def _look_at_earlier(self, config: Config) -> None:
        """Whether a run that lies in run.dir can be continued, by what need not be hashed."""
        from mtllm_engine.training import checkpoint

        folder = checkpoint.latest(Path(config.run.dir) / "checkpoints")
        record = folder and checkpoint.record_of(folder)
        if not record:
            return
        for key, value in flatten(config).items():
            if key.startswith(checkpoint.IDENTITY):
                value = list(value) if isinstance(value, tuple) else value
                current = {key: value}
                self.ask(
                    lambda current=current: checkpoint.check_identity(
                        folder, record["identity"], current
                    ),
                    key,
                )

    def _look_at_languages(
        self,
        corpora: Iterable[tuple[str, Path, Manifest]],
        languages: "EncoderLanguages | None",
    ) -> None:
        """Whether the encoder has those of the corpora, of the probe and of the fallbacks."""
        config, probe = self.config, self.config.probe
        if languages is None:
            return
        if probe.folder and self.command == "train":
            from mtllm_engine.training.probe import find_lines

            keys = ("probe.folder", "probe.split", "probe.languages")
            self.ask(lambda: find_lines(config, languages), *keys, name="probe")
        for key, folder, manifest in corpora:
            token = lambda code=manifest.language: languages.token_of(code)  # noqa: E731
            self.ask(token, name=f"{key}: {folder}")
        for code in config.languages.fallback if languages.is_told else ():
            self.ask(
                lambda code=code: languages.resolve(code, config.languages.fallback),
                "languages.fallback",
            )

    def _look_at_tests(self) -> None:
        """The test sets, and whether checkpoints can answer them."""
        config = self.config
        is_broken = any(each.startswith(("model.", "task.", "evaluate.")) for each in self.problems)
        is_known = self.knows("task", "evaluate", "model", "languages")
        if self.to_fetch or is_broken or not is_known:
            return self._look_for_tests()
        from mtllm_engine.evaluation.systems import find_systems, find_tests

        is_made = any(map(self._is_made, (*config.model.init_from, config.model.teacher)))
        if is_made:
            self.ask(lambda: find_tests(config))
        else:
            self.ask(lambda: find_systems(config))

    def _look_for_tests(self) -> None:
        """Whether test sets are there, where nobody can say in which languages they are read."""
        from mtllm_engine.tasks import find_dataset

        lack = "has no test examples in any language"
        for source in self.config.task.test if self.task and self.knows("task.test") else ():
            found = ask([], lambda source=source: find_dataset(self.task, source))  # told before
            there = found and self.ask(lambda found=found: found[0].present(found[1], "test"))
            if there == []:
                self.problems.append(f"task.test: {source} {lack}")

    def header(self) -> dict[str, str]:
        """What would run."""
        model = self.config.model
        if not (self.stack and self.tokenizer):
            rows = {"run": self.config.run.dir, "learns": self.summary()}
            rows |= {"encoder": model.encoder, "decoder": model.decoder}
            return rows | {"to fetch": ", ".join(self.to_fetch)}
        from mtllm_engine.training import checkpoint, log

        world = self._world()
        machine = log.environment(world)
        earlier = checkpoint.latest(Path(self.config.run.dir) / "checkpoints")
        start = checkpoint.step_of(earlier) if earlier else 0
        about = (self.settled, world, self.stack, self.tokenizer, start, None)
        rows = log.header(*about, self.layout, device=machine["device"])
        rows |= {"memory": self.memory.row()} if self.memory else {}
        if self.disk_bytes:
            free = shutil.disk_usage(nearest_folder(Path(self.config.run.dir))).free
            rows["disk"] = (
                f"checkpoints of up to {gigabytes(self.disk_bytes)}; {gigabytes(free)} are free"
            )
        return rows

    def summary(self) -> str:
        """What is learned, and for how long, in words."""
        if self.command == "evaluate":
            return (
                f"{', '.join(self.config.evaluate.systems)} on {', '.join(self.config.task.test)}"
            )
        from mtllm_engine.training.log import learns

        optim = self.config.optim
        length = f"{optim.steps} steps" if optim.steps else f"{optim.epochs:g} epochs"
        return f"{learns(self.config)}; {length}"

    def _world(self) -> "World":
        import torch

        from mtllm_engine.world import World, device_type

        device = torch.device(device_type())
        return World(rank=0, size=self.gpus, local_rank=0, device=device)


def ask(problems: list[str], question: Callable[[], T], name: str = "") -> T | None:
    try:
        return question()
    except (ValueError, OSError) as error:
        said = line_of(error)
        message = said if said.startswith(name) else f"{name}: {said}"
        # The same is one line, whether it names the key or not.
        problems += [] if any(each.endswith(said) for each in problems) else [message]
        return None


def line_of(error: Exception) -> str:
    return " ".join(str(error).split())


def _single(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tables of one key each, to the second level."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from ({key: {inner: each}} for inner, each in value.items())
        else:
            yield {key: value}


def nearest_folder(folder: Path) -> Path:
    """The folder, or what is there of the path to it."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.exists())
