"""The English task: `deepspeed --num_gpus N --module mtllm_engine.finetune CONFIG
[section.key=value ...]`.

LLM, adapters and a head learn from labels, in the loop of `mtllm_engine.train`; what comes out is
stage 2's teacher.
"""

import sys

from mtllm_engine.config import Config
from mtllm_engine.train import learn
from mtllm_engine.training.launch import run_command
from mtllm_engine.world import World


def finetune(config: Config, world: World) -> None:
    """`learn`, from the labels of `task.train`: the LLM does, or the stack where
    `objective.reader = "stack"` says so."""
    assert config.objective.kind == "finetune", "configurations are loaded with finetunes=True"
    learn(config, world)


if __name__ == "__main__":
    sys.exit(run_command(finetune, "finetune", finetunes=True))
