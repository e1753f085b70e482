"""Stored teacher states: `deepspeed --num_gpus N --module mtllm_engine.targets CONFIG [section.key=value ...]`.

Runs the teacher once over data.train and data.validation and writes `targets-NAME` beside each corpus, NAME being
`data.targets`; `mtllm_engine.train` with the same configuration then reads them instead of running the teacher.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mtllm_engine import checkpoint
from mtllm_engine.config import Config
from mtllm_engine.data.batch import collate
from mtllm_engine.data.shards import Manifest
from mtllm_engine.data.stream import agree, build_stream
from mtllm_engine.data.targets import Targets, Writer
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.engine import PlainEngine, ZeroEngine, build_engine, shard
from mtllm_engine.model.pretrained import build_stack, build_tokenizer, read_lora
from mtllm_engine.tasks import load_task
from mtllm_engine.train import prepare, run_command
from mtllm_engine.world import World


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The bare or the fine-tuned LLM alone, as an engine that learns nothing."""

    engine: PlainEngine | ZeroEngine
    tokenizer: PairTokenizer
    width: int
    flops: int  # of a token


def write_targets(config: Config, world: World) -> None:
    """Writes what is missing; targets that are there and fit are left as they are.

    Raises:
        ValueError: `data.targets` names nothing, or states of another teacher or text are there under that name.
    """
    if not config.data.targets:
        raise ValueError("data.targets is empty: name the states that are to be written")
    config = world.on_main(lambda: prepare(config))
    maker = world.on_main(lambda: checkpoint.teacher_identity(config))
    corpora = [Path(path) for path in (*config.data.train, config.data.validation) if path]
    missing = world.on_main(lambda: [path for path in corpora if not _is_there(path, config.data.targets, maker)])
    if missing:
        teacher = _teacher(config, world)
        for corpus in missing:
            _write(config, world, teacher, corpus, maker)


def _is_there(corpus: Path, name: str, maker: dict) -> bool:
    if not (corpus / f"targets-{name}").is_dir():
        return False
    Targets(corpus, name, maker)  # whether they fit
    return True


def _teacher(config: Config, world: World) -> Teacher:
    model = replace(config.model, start=config.model.teacher, teacher="")
    objective = replace(config.objective, kind="evaluate", reader="llm")
    lora = read_lora(Path(model.start).expanduser()) if model.start else replace(config.lora, targets=())
    task = config.task if model.start else replace(config.task, name="", test=())
    alone = replace(config, model=model, objective=objective, lora=lora, task=task)
    stack, weights = world.together(lambda: build_stack(alone))
    tokenizer = world.together(lambda: build_tokenizer(config, stack))  # texts as stage 2 cuts them
    width, (_, flops) = stack.objective.norm.shape[0], stack.flops(stored_targets=True)
    engine = build_engine(alone, shard(stack, weights, alone, world), world)
    return Teacher(engine=engine, tokenizer=tokenizer, width=width, flops=flops)


def _write(config: Config, world: World, teacher: Teacher, corpus: Path, maker: dict) -> None:
    manifest = Manifest.load(corpus)
    is_task = config.task.name and "spans" in manifest.fields  # else whole documents are pooled
    spans = max(1, load_task(config.task.name).num_choices) if is_task else 1
    dtype = np.dtype(np.float32 if config.model.dtype == "float32" else np.float16)
    data = replace(config.data, validation=str(corpus), targets="")
    stream = world.together(lambda: build_stream(data, teacher.tokenizer, world, seed=config.run.seed, epochs=1))
    writer = world.on_main(lambda: None)
    if world.is_main:
        writer = Writer(corpus, config.data.targets, maker, (spans, teacher.width), dtype)
    progress = tqdm(total=manifest.samples, unit="document", desc=corpus.name, disable=not world.is_main)
    start_s, flops = time.perf_counter(), 0
    with teacher.engine.evaluating(), progress:
        while (work := agree(stream, world, config.memory.max_tokens)).totals.documents:
            rows = []
            for documents in work.micro_batches:
                batch = collate(documents, step_seed=0, device=world.device, idle=work.idle)
                pooled_PD = teacher.engine(batch, work.totals).outputs.student_PD.float().cpu().numpy()
                places = np.cumsum([len(document.teacher_spans_P2) for document in documents])
                rows += zip([document.row[1:] for document in documents], np.split(pooled_PD, places))
            gathered = world.gather(rows)
            world.on_main(lambda: [writer.write(*row, states) for part in gathered for row, states in part])  # noqa: B023
            flops += teacher.flops * work.teacher_tokens
            progress.update(work.totals.documents)
    stream.close()
    gpu_hours = (time.perf_counter() - start_s) * world.size / 3600
    world.on_main(lambda: str(writer.finish(gpu_hours=gpu_hours, flops=flops)))


if __name__ == "__main__":
    sys.exit(run_command(write_targets, "targets"))
