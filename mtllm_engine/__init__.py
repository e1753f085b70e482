"""MT-LLM: an MT encoder under an LLM, trained by self-distillation.

from mtllm_engine import MTLLM
"""

import importlib

__all__ = ["MTLLM"]


def __getattr__(name: str):
    """`MTLLM` where it is asked for: it needs torch, and most who import a part of this do not."""
    if name in __all__:
        return getattr(importlib.import_module("mtllm_engine.inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
