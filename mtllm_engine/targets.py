"""Stored teacher states: `deepspeed --num_gpus N --module mtllm_engine.targets CONFIG
[section.key=value ...]`.

Runs the teacher once over data.train and validation.corpus and writes `teacher_states-NAME` beside
each corpus, NAME being `data.teacher_states`; `mtllm_engine.train` with the same configuration then
reads them instead of running the teacher.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mtllm_engine.config import Config
from mtllm_engine.data.shards import Manifest
from mtllm_engine.data.stream import build_stream, each_step
from mtllm_engine.data.teacher_states import TeacherStates, TeacherStatesWriter, folder_of
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.model.peft import read_lora
from mtllm_engine.progress import Bar
from mtllm_engine.tasks import load_task
from mtllm_engine.train import find_task, prepare
from mtllm_engine.training import checkpoint
from mtllm_engine.training.engine import PlainEngine, ZeroEngine, build_engine, shard
from mtllm_engine.training.launch import run_command
from mtllm_engine.training.layout import settle
from mtllm_engine.training.lock import sole_owner
from mtllm_engine.training.origins import check_origins
from mtllm_engine.world import World


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The bare or the fine-tuned LLM alone, as an engine that learns nothing."""

    engine: PlainEngine | ZeroEngine
    tokenizer: PairTokenizer
    width: int
    flops: int  # of a token


def write_targets(config: Config, world: World) -> None:
    """Writes what is missing; states that are there and fit are left as they are.

    Raises:
        ValueError: `data.teacher_states` names nothing, or states of another teacher or text are
            there under that name.
    """
    name = config.data.teacher_states
    if not name:
        raise ValueError("data.teacher_states is empty: name the states that are to be written")
    with sole_owner(Path(config.run.dir), world):
        config = world.on_main(lambda: prepare(config))
        maker = world.on_main(lambda: checkpoint.teacher_identity(config))
        corpora = [Path(path) for path in (*config.data.train, config.validation.corpus) if path]
        missing = world.on_main(
            lambda: [path for path in corpora if not _is_there(path, name, maker)]
        )
        if missing:
            config, layout = settle(config, world)
            world.on_main(lambda: print(f"teacher's weights: {layout}", flush=True))
            teacher = _build_teacher(config, world)
            for corpus in missing:
                _write(config, world, teacher, corpus, maker)


def _is_there(corpus: Path, name: str, maker: dict) -> bool:
    if not folder_of(corpus, name).is_dir():
        return False
    TeacherStates(corpus, name, maker)  # whether they fit
    return True


def _build_teacher(config: Config, world: World) -> Teacher:
    """The LLM of model.teacher; without one the bare LLM, which has no adapters and no head."""
    folder = config.model.teacher
    task = find_task(config) if folder else None
    lora = read_lora(Path(folder)) if folder else replace(config.lora, target_modules=())
    model = replace(config.model, init_from=(folder,) if folder else (), teacher="")
    objective = replace(config.objective, kind="finetune", reader="llm")
    alone = replace(config, model=model, objective=objective, lora=lora)
    head = task.head_size if task else None
    world.on_main(lambda: check_origins(alone))
    stack, weights = world.together(lambda: build_stack(alone, head=head, learns=False))
    tokenizer = world.together(lambda: build_tokenizer(config, stack))  # texts as stage 2 cuts them
    width, (_, flops) = stack.objective.norm.shape[0], stack.flops(stored_states=True)
    engine = build_engine(alone, shard(stack, weights, alone, world), world)
    return Teacher(engine=engine, tokenizer=tokenizer, width=width, flops=flops)


def _write(config: Config, world: World, teacher: Teacher, corpus: Path, maker: dict) -> None:
    manifest, name = Manifest.load(corpus), config.data.teacher_states
    is_task = config.task.name and "spans" in manifest.fields  # else whole documents are pooled
    spans = max(1, load_task(config.task.name).num_choices) if is_task else 1
    dtype = np.dtype(np.float32 if config.model.dtype == "float32" else np.float16)
    data = replace(config.data, teacher_states="")
    options = {"seed": config.run.seed, "corpus": corpus}
    stream = world.together(lambda: build_stream(data, teacher.tokenizer, world, **options))
    writer = world.on_main(lambda: None)
    if world.is_main:
        writer = TeacherStatesWriter(corpus, name, maker, (spans, teacher.width), dtype)

    def write(parts: list[list[tuple[tuple[int, int], np.ndarray]]]) -> None:
        for part in parts:
            for (shard_number, index), states_PD in part:
                writer.write(shard_number, index, states_PD)

    bar = {"total": manifest.samples, "unit": "document", "desc": corpus.name}
    start_s, flops = time.perf_counter(), 0
    with teacher.engine.evaluating(), Bar(**bar, disable=not world.is_main) as progress:
        for global_batch in each_step(stream, world, config.memory.max_tokens):
            rows = []
            for documents, batch in global_batch.batches(world.device):
                outputs = teacher.engine(batch, global_batch.totals).outputs
                ends = np.cumsum([len(document.teacher_spans_P2) for document in documents])
                states = np.split(outputs.student_PD.float().cpu().numpy(), ends)
                rows += zip([document.row[1:] for document in documents], states)
            parts = world.gather(rows)
            world.on_main(lambda parts=parts: write(parts))
            flops += teacher.flops * global_batch.teacher_tokens
            progress.update(global_batch.totals.documents)
    gpu_hours = (time.perf_counter() - start_s) * world.size / 3600
    world.on_main(lambda: str(writer.finish(gpu_hours=gpu_hours, flops=flops)))


if __name__ == "__main__":
    sys.exit(run_command(write_targets, "targets"))
