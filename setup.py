"""Package `mtllm_engine`; the ops in `kernels/` and `csrc/` are installed inside it (see
mtllm_engine/kernels.py).
"""

from pathlib import Path

from setuptools import find_packages, setup

OPS = sorted(path.parent.name for path in Path("kernels").glob("*/__init__.py"))

setup(
    name="mtllm-engine",
    version="0.1.0",
    description="Training engine for MT-LLM: an MT encoder under an LLM, by self-distillation",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["mtllm_engine", "mtllm_engine.*"]),
        "mtllm_engine.kernels",
        *(f"mtllm_engine.kernels.{op}" for op in OPS),
        "mtllm_engine.csrc",
    ],
    package_dir={"mtllm_engine.kernels": "kernels", "mtllm_engine.csrc": "csrc"},
    package_data={
        "mtllm_engine.csrc": ["*.cpp", "cpu/*", "cuda/*"],
        "mtllm_engine.kernels.attention": ["measured.json"],
    },
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.6",
        "transformers>=5.0",
        "tokenizers",
        "safetensors",
        "huggingface-hub",
        "regex",
        "numpy",
        "webdataset>=1.0",
        "pyarrow",
        "tqdm",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "flash4": ["flash-attn-4>=4.0.0b36"],
        "triton": ["triton"],
        "benchmarks": ["liger-kernel", "peft"],  # what ours is measured beside
        "gguf": ["gguf"],  # mtllm models import FILE.gguf
        "quantised": ["bitsandbytes>=0.46"],  # model.quantization = "nf4"
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"),
            *("peft", "triton", "bitsandbytes>=0.46", "gguf", "sentencepiece"),
        ],
        "quickstart": ["sentencepiece"],
    },
    entry_points={"console_scripts": ["mtllm = mtllm_engine.cli:main"]},
)
