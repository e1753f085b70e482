"""The English task: `deepspeed --num_gpus N --module mtllm_engine.finetune CONFIG [section.key=value ...]`.

LLM, adapters and a head learn from labels, in the loop of `mtllm_engine.train`; what comes out is stage 2's teacher.
"""

import sys

from mtllm_engine.config import Config
from mtllm_engine.train import run_command, train
from mtllm_engine.world import World


def finetune(config: Config, world: World) -> None:
    """As `train`, towards the labels of `task.train`; by the LLM, unless `objective.reader` says otherwise.

    Raises:
        ValueError: As `train`; the config is of another kind of training.
    """
    if config.objective.kind != "finetune":
        raise ValueError('objective.kind must be "finetune" here; `mtllm train` distils')
    train(config, world)


if __name__ == "__main__":
    sys.exit(run_command(finetune, "finetune"))
