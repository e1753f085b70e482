"""`mtllm models`: GGUF made a model's folder, and whether an encoder and an LLM fit one another."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from mtllm_engine import files
from mtllm_engine.config import Config, from_dict
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.data.vocabulary import load_tokenizer
from mtllm_engine.export.streaming import Planned, write_safetensors
from mtllm_engine.languages import ENGLISH
from mtllm_engine.model.build import build_stack, build_tokenizer, longest_text, read_encoder
from mtllm_engine.model.families import DecoderSpec, decoder_spec, read_config
from mtllm_engine.model.licences import licence_of
from mtllm_engine.model.tensors import TensorFiles, resolve
from mtllm_engine.model.weights import Weights
from mtllm_engine.training import memory

T = TypeVar("T")
EXAMPLE = "Hello, world!"
CARD = """---
license: {licence}
---
# {name}

Made by `mtllm models import` of `{file}` (sha256 {sha256}).
Its weights are {types}; here they are {dtype}.
{cut}"""


def import_gguf(file: Path, out: Path, *, dtype: str = "float32", layers: int = 0) -> int:
    """Writes a model's folder from a GGUF file, every weight as a plain number.

    Args:
        dtype: Of the weights: float32 holds what the file says, bfloat16 rounds it.
        layers: The first so many, under the last norm; 0: all.

    Returns:
        The number of weights.

    Raises:
        ValueError: There is something at `out`, the package gguf is missing, the file cannot be
            read or is of another family than those that go in, or it has fewer layers.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; name a new folder")
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if find_spec("gguf") is None:
        raise ValueError("GGUF is read by the package gguf: pip install 'mtllm-engine[gguf]'")
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = _read(file, lambda: AutoConfig.from_pretrained(**place, trust_remote_code=False))
    num_layers = decoder_spec(config, str(file)).num_layers  # before any weight is read
    if not 0 <= layers <= num_layers:
        raise ValueError(f"--layers {layers}: {file} has {num_layers}; 0 stands for all")
    tokenizer = _read(file, lambda: AutoTokenizer.from_pretrained(**place, trust_remote_code=False))
    card = _read(file, lambda: _card(file, dtype, (layers, num_layers) if layers else ()))
    model = _read(file, lambda: _load(place))
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = getattr(torch, dtype)
    if layers:
        _keep_first(model, layers)
    with files.atomic_folder(out) as draft:
        write_safetensors(draft / "model.safetensors", _planned(model, config.dtype))
        config.architectures = [type(model).__name__]
        for part in (config, tokenizer):
            part.save_pretrained(draft)
        (draft / "README.md").write_text(card)
        for path in draft.iterdir():
            with path.open("rb+") as written:
                files.sync(written)
    return sum(each.numel() for each in model.parameters())


def _read(file: Path, question: Callable[[], T]) -> T:
    """Raises: ValueError: The file is damaged, or nothing that transformers reads."""
    try:
        return question()
    except Exception as error:  # transformers' and gguf's own, of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} cannot be read: {reason}") from error


def _load(place: dict[str, str]) -> torch.nn.Module:
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    if hasattr(transformers, "GgufConfig"):  # else they are always made plain numbers
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(**place, **options)


def _keep_first(model: torch.nn.Module, layers: int) -> None:
    """Drops the layers after the first so many, whatever kinds they are of."""
    config, decoder = model.config, model.get_decoder()
    decoder.layers = decoder.layers[:layers]
    config.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:layers]


def _planned(model: torch.nn.Module, dtype: torch.dtype) -> list[Planned]:
    """Every parameter once: of tied ones the first, which is the embedding's."""
    return [
        Planned(name, dtype, tuple(each.shape), lambda each=each: [each.data])
        for name, each in model.named_parameters()
    ]


def _card(file: Path, dtype: str, kept: Sequence[int]) -> str:
    """Args: kept: So many layers, of so many; empty: all."""
    from gguf import GGUFReader  # an extra

    reader = GGUFReader(file)
    about = {
        key: reader.fields[f"general.{key}"].contents()
        for key in ("license", "name")
        if f"general.{key}" in reader.fields
    }
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return CARD.format(
        licence=about.get("license", "unknown"),
        name=about.get("name", file.stem),
        file=file.name,
        sha256=files.sha256_of(file),
        types=", ".join(f"{kind} ({count} tensors)" for kind, count in types.most_common()),
        dtype=dtype,
        cut="Of its {1} layers the first {0} are here.\n".format(*kept) if kept else "",
    )


@dataclass
class Findings:
    """What is known of a pair of models, by name, and what stands in its way."""

    rows: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def ask(self, question: Callable[[], T]) -> T | None:
        """The answer; None where it is a problem, which is kept."""
        try:
            return question()
        except (ValueError, OSError) as error:
            problem = " ".join(str(error).split())
            self.problems += [] if problem in self.problems else [problem]
            return None


def check(encoder: str, llm: str, adapters: Sequence[str] = ()) -> Findings:
    """Whether an encoder and an LLM can be trained together, and what they are; of their weights
    only the files' headers are read.

    Args:
        encoder, llm: Folders or hub ids, which are fetched.
        adapters: Of the LLM, to be merged first.
    """
    found = Findings()
    rows, ask = found.rows, found.ask
    folder, llm_folder = ask(lambda: resolve(encoder)), ask(lambda: resolve(llm))
    read = folder and ask(lambda: read_encoder(folder))
    spec = llm_folder and ask(lambda: _spec(llm_folder))
    for side in filter(None, (folder, llm_folder)):
        ask(lambda side=side: load_tokenizer(side))
    tensors = [side and ask(lambda side=side: TensorFiles(side)) for side in (folder, llm_folder)]
    if read:
        size = f"{read.num_hidden_layers} layers of {read.hidden_size}"
        rows["encoder"] = f"{encoder}: {read.model_type}, {size}, vocabulary {read.vocab_size:,}"
    if spec:
        heads = f"{spec.num_heads} heads over {spec.num_kv_heads}"
        size = f"{spec.num_layers} layers of {spec.width}, {heads}"
        rows["LLM"] = f"{llm}: {spec.family}, {size}, vocabulary {spec.vocab_size:,}"
    licences = {each: licence_of(each) for each in (encoder, llm, *adapters)}
    rows["licences"] = ", ".join(f"{each}: {licence}" for each, licence in licences.items())
    if found.problems:
        return found
    limit = longest_text(read)
    longest = min(512, spec.max_length, limit or 512)
    config = _config(encoder, llm, adapters, max_length=longest)
    built = ask(lambda: build_stack(config))
    if built is None:
        return found
    stack, weights = built
    tokenizer = ask(lambda: build_tokenizer(config, stack))
    if tokenizer:
        rows["texts"] = tokenizer.around
        rows |= ask(lambda: _examples(tokenizer)) or {}
    ends = f"{limit:,} tokens" if limit else "of any length"
    rows["longest text"] = f"{ends} for the encoder, {spec.max_length:,} for the LLM ({spec.limit})"
    if adapters:
        rows["adapters"] = f"merged into the LLM first: {', then '.join(adapters)}"
    rows |= _read_bytes(weights, *tensors)
    rows["memory"] = _memory(config, read, spec)
    return found


def _spec(folder: Path) -> DecoderSpec:
    return decoder_spec(read_config(folder, "the LLM"), f"the LLM {folder}")


def _config(encoder: str, llm: str, adapters: Sequence[str], *, max_length: int) -> Config:
    """Of a run by the defaults."""
    model = {"encoder": encoder, "decoder": llm} | ({"adapters": adapters} if adapters else {})
    data = {"train": ["-"], "pack_documents": 1, "max_length": max_length}
    return from_dict({"run": {"dir": "-"}, "model": model, "data": data, "optim": {"steps": 1}})


def _examples(tokenizer: PairTokenizer) -> dict[str, str]:
    """A text as both sides read it, and the languages that it may be in."""
    codes = sorted(tokenizer.languages.codes)
    if not codes:
        raise ValueError("the encoder's tokenizer has no language's token, such as swh_Latn")
    language = ENGLISH if ENGLISH in codes else codes[0]
    sides = zip((tokenizer.encoder, tokenizer.decoder), tokenizer(EXAMPLE, language))
    tokens = [" ".join(side.convert_ids_to_tokens(ids_S.tolist())) for side, ids_S in sides]
    shown = f"{', '.join(codes[:8])}{', ...' if len(codes) > 8 else ''}"
    how = "" if tokenizer.languages.is_told else " (it is not told which, and reads others too)"
    return {
        "an example": f"{EXAMPLE!r} is {tokens[0]!r} for the encoder, {tokens[1]!r} for the LLM",
        "languages": f"{len(codes)}{how}: {shown}",
    }


def _read_bytes(weights: Weights, encoder: TensorFiles, llm: TensorFiles) -> dict[str, str]:
    """What of each model's files fills the stack."""
    rows = {}
    for side, tensors, ours in (
        ("encoder's weights", encoder, ("encoder.", "projection.")),
        ("LLM's weights", llm, ("decoder.", "objective.")),
    ):
        total: Counter[str] = Counter()
        sources = [each for name, each in weights.sources.items() if name.startswith(ours)]
        names = {name for source in sources for name in source.names}
        for name in names:
            dtype = tensors.read(name, 0, 1).dtype  # as it is stored
            size = math.prod(tensors.shape(name)) * dtype.itemsize
            total[str(dtype).removeprefix("torch.")] += size
        count = len({tensors.path(name) for name in names})
        in_files = f"{count} file{'s' if count > 1 else ''}"
        rows[side] = f"{total.total() / 1e9:,.3f} GB of {', '.join(total)}, in {in_files}"
    return rows


def _memory(config: Config, encoder: PreTrainedConfig, spec: DecoderSpec) -> str:
    needed = memory.total(memory.estimate(config, encoder, spec, 1)) / 1e9
    tokens = f"micro-batches of {config.memory.max_tokens:,} tokens"
    return f"{needed:.1f} GB to train on one GPU by the defaults ({config.model.dtype}, {tokens})"
