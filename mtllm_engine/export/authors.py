"""The layout of the paper's authors' own model, out of our stacks and back into adapters.

Their class NLLBLLM2Vec holds `nllb_encoder` (an M2M100Encoder), `up_proj` (a linear without bias)
and `llm2vec` (a LlamaModel with attention from both sides), the adapters merged. Source: hub model
fdschmidt93/NLLB-LLM2Vec-Meta-Llama-31-8B-Instruct-mntp-unsup-simcse, its code, whose weights were
not at hand: the tensors' names follow from its attributes and transformers' modules.
"""

import json
import math
from pathlib import Path

import safetensors.torch
import torch
from torch.nn import functional
from transformers import LlamaConfig

from mtllm_engine import files
from mtllm_engine.config import LORA_TARGETS, LoraConfig
from mtllm_engine.export import Options
from mtllm_engine.export.models import (
    copy_tokenizer,
    dtype_of,
    encoder_tensors,
    llm_dtype,
    merged_llm,
    read_config,
    read_json,
    write_card,
    write_json,
)
from mtllm_engine.export.streaming import Planned, planned, write_safetensors
from mtllm_engine.model import peft
from mtllm_engine.model.build import load_config
from mtllm_engine.model.tensors import TensorFiles, check_finite, fingerprint, resolve
from mtllm_engine.model.weights import ADAPTERS, PROJECTION_FILE, checkpoint_tensors
from mtllm_engine.training.checkpoint import FORMAT, write_file
from mtllm_engine.training.trained import Trained

HUB = "fdschmidt93/NLLB-LLM2Vec-Meta-Llama-31-8B-Instruct-mntp-unsup-simcse"
ENCODER, PROJECTION, LLM = "nllb_encoder.", "up_proj.weight", "llm2vec."
RANK, OVERSAMPLED = 16, 16  # theirs; random directions beyond it
CARD = f"""
# $encoder under $llm, in the layout of the paper's authors

Licences:

$licences

`config.json` and the tensors are laid out as those of `{HUB}`, whose code reads them:

    AutoModel.from_pretrained(".", trust_remote_code=True)

takes that code from the hub. It was not tried: their code needs an older transformers, and their
weights were not at hand, so that the tensors' names (`nllb_encoder.`, `up_proj.weight`, `llm2vec.`)
and the keys of `config.json` (`nllb_config`, `llm2vec_config`) follow from their code's attributes.
$base$head"""


def write(trained: Trained, draft: Path, options: Options) -> None:
    """Raises: ValueError: The layout has no place for something of the stack."""
    model, data = trained.config.model, trained.config.data
    projection = checkpoint_tensors(trained.student)
    encoder, llm = resolve(model.encoder), resolve(model.decoder)
    kinds = [read_json(each / "config.json").get("model_type") for each in (encoder, llm)]
    for name, lacks in (
        (f"a {kinds[0]} encoder", kinds[0] != "m2m_100"),
        (f"a {kinds[1]} LLM", kinds[1] != "llama"),
        ("model.projection_bias=true", "bias" in projection.names),
        ("model.causal=true", model.causal),
        (f"data.parts={data.parts}", data.parts != "whole"),
    ):
        if lacks:
            fix = "export the folder, which has one"
            raise ValueError(f"{trained.name}: the authors' layout has no place for {name}; {fix}")
    write_safetensors(draft / "model.safetensors", _tensors(trained, projection, options.dtype))
    dtypes = {encoder: options.dtype, llm: llm_dtype(trained, options.dtype)}
    described = {part: read_config(part, dtype) for part, dtype in dtypes.items()}
    config = {
        "architectures": ["NLLBLLM2Vec"],
        "auto_map": {
            "AutoConfig": f"{HUB}--configuration_nllbllm2vec.NLLBLLM2VecConfig",
            "AutoModel": f"{HUB}--modeling_nllbllm2vec.NLLBLLM2Vec",
        },
        "llm2vec_config": described[llm],
        "model_type": "nllb-llm2vec",
        "nllb_config": described[encoder],
        "torch_dtype": described[llm]["dtype"],
    }
    write_json(draft / "config.json", config)
    copy_tokenizer(encoder, draft)
    write_card(trained, draft, CARD)


def _tensors(trained: Trained, projection: TensorFiles, dtype: str) -> list[Planned]:
    parts = {ENCODER: encoder_tensors(trained, dtype), LLM: merged_llm(trained, dtype)}
    tensors = [planned(projection, "weight", dtype=dtype_of(dtype), to=PROJECTION)]
    for prefix, each in parts.items():
        tensors += [tensor._replace(name=prefix + tensor.name) for tensor in each]
    return tensors


def adapters_from(name: str, base: str, out: Path, *, rank: int = RANK) -> dict[str, float]:
    """Writes a checkpoint of ours from a folder in their layout: the projection, and adapters that
    are the best of their rank for each linear's difference from the LLM that it began with.

    Args:
        name, base: Folders or hub ids.

    Returns:
        What of the differences is left out, as a share of their Frobenius norm, of each kind of
        linear, and of all ("all").

    Raises:
        ValueError: There is something at `out`, no base, a base of another kind, or a tensor is
            missing or differs that no adapter changes.
    """
    if not base:
        raise ValueError(
            "--base is missing: their student is not its teacher, whose weights ours shares; "
            "name the LLM that theirs began with, and adapters are made of the difference"
        )
    if out.exists() or rank < 1:
        wrong = f"--rank must be at least 1, not {rank}"
        raise ValueError(f"{out} is there already; name a new folder" if out.exists() else wrong)
    folder = resolve(base)
    load_config(folder, LlamaConfig, "--base")
    theirs = TensorFiles(resolve(name))
    ours = TensorFiles(folder, rename=lambda name: name.removeprefix("model."))
    contents, left = _split(theirs, ours, rank)
    lora = LoraConfig(rank=rank, alpha=float(rank), target_modules=LORA_TARGETS)
    about = peft.peft_config(lora, base, causal=False)
    identity = {"model.causal": False, "model.decoder": fingerprint(folder)}
    with files.atomic_folder(out) as draft:
        saved = {file: safetensors.torch.save(each, FORMAT) for file, each in contents.items()}
        saved[peft.FILE] = json.dumps(about, indent=1).encode()
        hashes = {file: write_file(draft / file, content) for file, content in saved.items()}
        write_file(draft / "state.json", files.sealed({"identity": identity, "files": hashes}))
    return left


def _split(
    theirs: TensorFiles, ours: TensorFiles, rank: int
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
    """What a checkpoint's files hold, and what is left out; one linear is held at a time."""
    adapters: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}  # of what is left out, and of all there was
    for name in ours.names:
        if not name.startswith(("layers.", "norm.")) or "rotary_emb" in name:
            continue
        kind = name.split(".")[-2]
        if kind not in LORA_TARGETS or not name.endswith(".weight"):
            _check_equal(theirs, ours, name)
            continue
        _check_shape(theirs, ours, name)
        difference_FD = _read(theirs, LLM + name) - _read(ours, name)
        b_FR, a_RD = _factors(difference_FD, rank)
        saved = f"base_model.model.{name.removesuffix('.weight')}"
        adapters |= {f"{saved}.lora_A.weight": a_RD, f"{saved}.lora_B.weight": b_FR}
        both = torch.stack([*map(_square, (difference_FD - b_FR @ a_RD, difference_FD))])
        for each in (kind, "all"):
            squares[each] = squares.get(each, 0.0) + both
    left = {
        kind: (part / whole.clamp(min=1e-300)).sqrt().item()
        for kind, (part, whole) in squares.items()
    }
    projection = {"weight": _read(theirs, PROJECTION)}
    return {ADAPTERS: adapters, PROJECTION_FILE: projection}, left


def _factors(difference_FD: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (F, R) and A (R, D), whose product is nearest. What was merged is of a low rank but for
    rounding: random projections find that to the last digits, in a hundredth of the time that all
    singular vectors take."""
    size = min(rank + OVERSAMPLED, *difference_FD.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u_FQ, s_Q, v_DQ = torch.svd_lowrank(difference_FD, q=size, niter=4)
    roots_R = s_Q[:rank].sqrt()
    missing = rank - len(roots_R)  # of a linear that is narrower than the rank
    b_FR = functional.pad(u_FQ[:, :rank] * roots_R, (0, missing))
    a_RD = functional.pad(v_DQ[:, :rank] * roots_R, (0, missing)).T
    return b_FR.contiguous(), a_RD.contiguous()


def _check_equal(theirs: TensorFiles, ours: TensorFiles, name: str) -> None:
    """Raises: ValueError: A tensor that adapters leave as it is is another one in the base."""
    _check_shape(theirs, ours, name)
    stored = theirs.read(LLM + name, 0, 1).dtype
    if not torch.equal(_read(ours, name).to(stored).float(), _read(theirs, LLM + name)):
        raise ValueError(f"{theirs.folder} did not begin with {ours.folder}: {name} differs")


def _check_shape(theirs: TensorFiles, ours: TensorFiles, name: str) -> None:
    """Raises: ValueError: They differ."""
    shape, other = ours.shape(name), theirs.shape(LLM + name)
    if shape != other:
        reason = f"{name} has shape {shape}, theirs {other}"
        raise ValueError(f"{theirs.folder} did not begin with {ours.folder}: {reason}")


def _square(matrix_FD: torch.Tensor) -> torch.Tensor:
    """Of the Frobenius norm, fp64."""
    return torch.linalg.vector_norm(matrix_FD, dtype=torch.float64).square()


def _read(files: TensorFiles, name: str) -> torch.Tensor:
    """In fp32."""
    shape = files.shape(name)
    values = check_finite(files.read(name, 0, math.prod(shape)), files.folder, name)
    return values.float().view(shape)
