"""Zero-shot evaluation: every system in every language, over all ranks, into one table.

    deepspeed --num_gpus N --module mtllm_engine.evaluate CONFIG [section.key=value ...]

The LLM of `model.teacher` reads the foreign text ("llm"), or its English translation
("translate_test"); the stack of `model.init_from` reads the foreign text through the MT encoder
("stack"), as does, without stage 2, the sum of stage 1's adapters and the LLM's ("sum"). A linear
head on the encoder's own states ("encoder") needs no LLM. Nobody has seen a label but English ones.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mtllm_engine.config import Config
from mtllm_engine.evaluation.encoder import EncoderReader
from mtllm_engine.evaluation.predictions import Predictions, load, path_of, save
from mtllm_engine.evaluation.provenance import is_same, makers
from mtllm_engine.evaluation.systems import (
    Kind,
    Reader,
    Test,
    build_translator,
    cost,
    find_systems,
    predict,
    readers,
    results_folder,
)
from mtllm_engine.evaluation.tables import translation_counts, write
from mtllm_engine.tasks import Task
from mtllm_engine.training.launch import run_command
from mtllm_engine.world import World


def evaluate(config: Config, world: World) -> None:
    """Writes predictions and tables below `evaluate.results`.

    What is there of this seed and was made by the very same (checkpoint, settings, examples,
    commit) stays, so that an evaluation that was killed goes on; all else of this seed is made
    again, and what another checkpoint or setting made, or other test files, is in no table.

    Raises:
        ValueError: A checkpoint, a test set or a model is missing or unfit.
    """
    folder = results_folder(config)
    task, tests = world.together(lambda: find_systems(config))
    read_by = readers(config)
    made = world.on_main(partial(makers, config, read_by))
    for kind, checkpoints in dict.fromkeys(read_by.values()):
        gpu_hours, flops = world.on_main(partial(cost, checkpoints))
        read = None
        for system in (each for each in read_by if read_by[each] == (kind, checkpoints)):
            translator = build_translator(config, world) if system == "translate_test" else None
            name = config.evaluate.stack_name if system == "stack" else system
            about = {"system": name, "gpu_hours": gpu_hours, "flops": flops}
            settings = dict(made[system]["settings"])
            settings |= {"translator": translator.settings} if translator else {}
            for test in tests:
                maker = made[system] | {"settings": settings, "test": test.digest}
                told = test.told(kind, translates=translator is not None)
                given = told and told.given
                if world.on_main(partial(_keep, folder, name, test, given, config.run.seed, maker)):
                    continue
                read = read or _build_reader(config, world, task, kind, checkpoints)
                answers = predict(config, world, task, read, translator, test)
                answers = replace(answers, **about, maker=maker)
                world.on_main(partial(_save, folder, answers))
    world.on_main(lambda: print(write(folder, baseline=_baseline(folder)).read_text()))


def _build_reader(
    config: Config, world: World, task: Task, kind: Kind, checkpoints: Sequence[str]
) -> Reader | EncoderReader:
    if kind == "encoder":
        return EncoderReader(config, world, task)
    return Reader(config, world, task, kind, checkpoints)


def _keep(
    folder: Path,
    system: str,
    test: Test,
    given: str | None,
    seed: int,
    maker: Mapping[str, Any],
) -> bool:
    """Whether predictions of the same maker are there already, which then count as made now.

    Args:
        given: The language that the encoder or the translator is told.
    """
    try:
        (answers,) = load(path_of(folder, system, test.dataset.name, test.language, seed))
    except ValueError:  # none, or damaged
        return False
    if answers.language_given != given or not is_same(answers.maker, maker):
        return False
    print(f"{system} of {test.dataset.name} in {test.language}: there already", flush=True)
    save(folder, replace(answers, maker=maker))
    return True


def _save(folder: Path, answers: Predictions) -> None:
    """Into the results' folder; what went wrong in translating is said at once."""
    if answers.cut or answers.unfinished:
        where = f"{answers.system} of {answers.dataset} in {answers.language}"
        print(f"{where}: {translation_counts(answers.translation_counts)}", flush=True)
    save(folder, answers)


def _baseline(folder: Path) -> str | None:
    """What the others are compared with: translate-test, if it is there."""
    return "translate_test" if any(folder.glob("*/translate_test")) else None


if __name__ == "__main__":
    sys.exit(run_command(evaluate, "evaluate"))
