"""What a stack is made of, as tensors to write: the encoder alone, the LLM with the student's
adapters in its weights, and the small files that a run trained.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from transformers import M2M100Config

from mtllm_engine.export import card
from mtllm_engine.export.clients import Client, class_of
from mtllm_engine.export.streaming import Planned, merged, planned, write_safetensors
from mtllm_engine.model import families, peft
from mtllm_engine.model.build import read_encoder
from mtllm_engine.model.merge import open_decoder
from mtllm_engine.model.padded import PaddedEncoder
from mtllm_engine.model.tensors import TensorFiles, Tensors, resolve, tokenizer_files
from mtllm_engine.model.weights import (
    ADAPTERS,
    DECODER_PREFIXES,
    HEAD_FILE,
    RUN_FILES,
    checkpoint_tensors,
    file_of,
    padded_sources,
)
from mtllm_engine.training.trained import Trained

ENCODER_PREFIXES = ("model.encoder.", "encoder.", "")
SHARED = ("model.shared", "shared")  # the encoder's embedding, where that stands beside it
PLACES = ("_name_or_path", "name_or_path")
FIRST = "layers.0.self_attn.q_proj.weight"  # of M2M-100's encoder, and of any LLM:
LLM_FIRST = "layers.0.mlp.down_proj.weight"


def encoder_tensors(trained: Trained, dtype: str) -> list[Planned]:
    """By the names of transformers' class of the encoder alone."""
    folder = resolve(trained.config.model.encoder)
    config, files = read_encoder(folder), TensorFiles(folder)
    if isinstance(config, M2M100Config):
        return _m2m100_tensors(files, dtype)
    encoder = PaddedEncoder(config, torch.float32)
    sources, tensors = padded_sources(files, encoder), []
    for name, parameter in encoder.named_parameters():
        source = sources[f"encoder.{name}"]
        source.check(name, parameter.shape)
        (stored,), to = source.names, encoder.family.name_alone(name)
        tensors.append(planned(files, stored, dtype=dtype_of(dtype), to=to))
    return tensors


def _m2m100_tensors(files: TensorFiles, dtype: str) -> list[Planned]:
    prefix = _first_of(files, ENCODER_PREFIXES, FIRST)
    ours = {name: name.removeprefix(prefix) for name in files.names if name.startswith(prefix)}
    kept = {name: to for name, to in ours.items() if to.startswith(("layers.", "layer_norm."))}
    where = _first_of(files, (f"{prefix}embed_tokens", *SHARED), ".weight")
    kept[f"{where}.weight"] = "embed_tokens.weight"
    return [planned(files, name, dtype=dtype_of(dtype), to=to) for name, to in kept.items()]


def llm_tensors(trained: Trained, dtype: str, *, merge: bool) -> Iterator[Planned]:
    """All that there are; of a model of texts and images the text's, by its own names.

    Args:
        merge: The student's adapters are added to the weights in fp32, which then are cast.
    """
    files = open_decoder(trained.config.model)
    dtype = llm_dtype(trained, dtype)
    adapters = checkpoint_tensors(trained.student)
    prefix = _first_of(files, DECODER_PREFIXES, LLM_FIRST)
    is_wrapped = _is_wrapped(Path(files.folder))
    for name in files.names:
        short = name.removeprefix(prefix)
        if is_wrapped and not name.startswith(prefix):
            continue
        tensor = planned(files, name, dtype=dtype_of(dtype), to=short if is_wrapped else name)
        saved = f"base_model.model.{short.removesuffix('.weight')}"
        is_adapted = merge and f"{saved}.lora_A.weight" in adapters.names
        yield merged(tensor, adapters, saved, trained.config.lora) if is_adapted else tensor


def merged_llm(trained: Trained, dtype: str) -> Iterator[Planned]:
    """`llm_tensors`, merged, by the names of transformers' model without a head for words: what is
    read are states."""
    tensors = list(llm_tensors(trained, dtype, merge=True))
    names = [tensor.name for tensor in tensors]
    prefix = next(each for each in DECODER_PREFIXES if each + LLM_FIRST in names)
    for tensor in tensors:
        to = tensor.name.removeprefix(prefix)
        if to.startswith(("layers.", "embed_tokens.", "norm.")) and "rotary_emb" not in to:
            yield tensor._replace(name=to)


def write_encoder(trained: Trained, folder: Path, dtype: str) -> None:
    """An ordinary folder of the encoder alone for the class that its config.json names, with the
    tokenizer."""
    source = resolve(trained.config.model.encoder)
    write_safetensors(folder / "model.safetensors", encoder_tensors(trained, dtype))
    write_config(source, folder, dtype, architectures=[class_of(source)])
    copy_tokenizer(source, folder)


def llm_dtype(trained: Trained, dtype: str) -> str:
    """Of the LLM's weights that are written, "" for their own: with adapters merged first they are
    in no file, and are written as they were in training."""
    model = trained.config.model
    return dtype or (model.dtype if model.adapters else "")


def write_config(source: Path, folder: Path, dtype: str, **changed: Any) -> None:
    """A model's config.json with some keys changed."""
    config = read_config(source, dtype) | changed
    write_json(folder / "config.json", config)


def read_config(source: Path, dtype: str) -> dict[str, Any]:
    """A model's config.json for weights of another dtype; ""; of their own. Of a model of texts and
    images the text's."""
    config = read_json(source / "config.json")
    if _is_wrapped(source):
        config = families.read_config(source, "the LLM").get_text_config().to_diff_dict()
        config = {key: value for key, value in config.items() if key not in PLACES}
    stored = config.pop("torch_dtype", None)  # transformers' older name
    kept = dtype or config.get("dtype") or stored
    return config | ({"dtype": kept} if kept else {})


def _is_wrapped(source: Path) -> bool:
    return read_json(source / "config.json")["model_type"] in families.WRAPPERS


def copy_tokenizer(source: Path, folder: Path) -> None:
    """A tokenizer, told that the control tokens that a text spells are its characters."""
    for path in tokenizer_files(source):
        shutil.copyfile(path, folder / path.name)
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    write_json(path, config | {"split_special_tokens": True})


def write_checkpoint(
    trained: Trained, source: Path, folder: Path, kept: Sequence[str] = RUN_FILES
) -> None:
    """What a run trained, in fp32, as a checkpoint of its own.

    Args:
        source: Of what `trained` stands on.
        kept: Files that are taken of it, where it has them.
    """
    tensors = checkpoint_tensors(source)
    for file in kept:
        names = [name for name in tensors.names if file_of(name) == file]
        if names:
            every = [planned(tensors, name, dtype=torch.float32) for name in names]
            write_safetensors(folder / file, every)
    if (folder / ADAPTERS).is_file():
        known, causal = card.about(trained), trained.config.model.causal
        on = {"causal": causal, "chain": known.get("adapters", ())}
        about = peft.peft_config(peft.read_lora(source), known["llm"], **on)
        write_json(folder / peft.FILE, about)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def dtype_of(name: str) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def write_card(trained: Trained, folder: Path, template: str) -> None:
    """README.md: what a format says of itself, and what every card says of a stack.

    Args:
        template: With `$encoder`, `$llm` and so on in it, as below and in `Client.words`.
    """
    model, data, about = trained.config.model, trained.config.data, card.about(trained)
    given = {
        "encoder": about["encoder"],
        "llm": about["llm"],
        "max_length": data.max_length,
        "parts": data.parts,
        "causal": model.causal,
        "attention": "causal" if model.causal else "bidirectional",
        "licences": "\n".join(f"- {name}: {each}" for name, each in about["licences"].items()),
        "head": _head_lines(trained),
        "base": _base_lines(about),
        "merged": _merging(trained),
        "pooling": """ --pooler-config '{"pooling_type": "MEAN"}'""" if model.causal else "",
    }
    given |= Client.of(trained.config).words
    front = {"base_model": list(about["licences"]), "tags": ["mt-llm"]}
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    text = f"---\n{lines}\n---\n{Template(template).substitute(given)}"
    (folder / "README.md").write_text(text)


def _base_lines(about: Mapping[str, Any]) -> str:
    lines = card.merged_first(about)
    if (form := about["quantization"]) != "none":
        lines.append(f"It was trained on weights held as {form}; here the LLM's own are meant.")
    return "".join(f"{line}\n" for line in lines)


def _merging(trained: Trained) -> str:
    """Lines of Python that merge `model.adapters` into `llm`."""
    # As they are named on a model around the LLM, PEFT would find no place for them.
    inner = json.dumps({r"^(language_model\.|model\.)+": ""})
    return "".join(
        f"llm = PeftModel.from_pretrained(llm, {json.dumps(name)}, key_mapping={inner})\n"
        "llm = llm.merge_and_unload()\n"
        for name in card.about(trained).get("adapters", ())
    )


def _head_lines(trained: Trained) -> str:
    if not (head := trained.head):
        return ""
    where = f"`{HEAD_FILE}` holds `head.weight` of the task {trained.task}"
    if head.kind == "span":
        return f"{where}: every state's scores of being the answer's first token, and its last.\n"
    if head.kind == "choice":
        return f"{where}: a choice's score, from the mean of its own states.\n"
    return f"{where}: the scores of {', '.join(head.labels)} are `vectors @ head.weight.T`.\n"


def read_json(path: Path) -> dict[str, Any]:
    """Without where the model lay, which is nobody's business."""
    content = json.loads(path.read_text("utf-8"))
    return {key: value for key, value in content.items() if key not in PLACES}


def _first_of(files: Tensors, candidates: tuple[str, ...], name: str) -> str:
    """The candidate that a tensor's name begins with.

    Raises:
        ValueError: It is there with none of them.
    """
    for each in candidates:
        if each + name in files.names:
            return each
    raise ValueError(f"{files.folder} has no tensor {candidates[0]}{name}")
