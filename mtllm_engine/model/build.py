"""From a configuration to the stack, what fills it, and the tokenizers that feed it."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import M2M100Config, PreTrainedConfig

from mtllm_engine.config import LORA_TARGETS, Config, ModelConfig
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.model import sums
from mtllm_engine.model.encoder import ACTIVATIONS
from mtllm_engine.model.families import DecoderSpec, decoder_spec, read_config
from mtllm_engine.model.merge import open_decoder
from mtllm_engine.model.objective import HeadSize
from mtllm_engine.model.padded import FAMILIES as PADDED
from mtllm_engine.model.padded import check_encoder
from mtllm_engine.model.peft import read_lora
from mtllm_engine.model.refusals import MIXTURE, has_experts, why_not
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.sums import open_start
from mtllm_engine.model.tensors import TensorFiles, resolve
from mtllm_engine.model.weights import (
    ADAPTERS,
    Weights,
    checkpoint_tensors,
    has_head,
    has_projection,
)


def build_stack(
    config: Config, *, head: HeadSize | None = None, learns: bool = True, device: str = ""
) -> tuple[Stack, Weights]:
    """The stack on the meta device, and what fills it (see `engine.shard`).

    Args:
        head: Of the task: its kind and number of outputs. Distillation from the bare LLM has none.
        learns: Or nothing is trained, and the head is that of `model.init_from`.
        device: As `Stack`.

    Raises:
        ValueError: A checkpoint is missing, of another architecture, or does not fit its
            configuration.
    """
    config = settle(config)
    model, distils = config.model, config.objective.kind == "distil"
    encoder, decoder = read_models(model)
    check_configs(config, encoder, decoder)
    start, frozen = open_start(config, learns=learns)
    teacher = checkpoint_tensors(model.teacher) if model.teacher else None
    if isinstance(start, TensorFiles):
        check_adapters(config, start)
    # A head is copied from the teacher by what distils, and read by what only reads.
    if distils and teacher is None:
        head = None
    giver = teacher if distils else None if learns else start
    if head and giver and not has_head(giver):
        fix = "it takes a run of `mtllm finetune`"
        raise ValueError(f"{giver.folder} has no head.safetensors; {fix}")
    reads_stack = config.objective.reader == "stack"
    if reads_stack and not learns and start and not has_projection(start):
        fix = "it takes a run of `mtllm train`"
        raise ValueError(f"{start.folder} has no projection.safetensors; {fix}")
    teacher_lora = read_lora(teacher.folder) if teacher else None
    with torch.device("meta"):
        stack = Stack(
            config,
            encoder,
            decoder,
            head=head,
            frozen_rank=frozen.rank if frozen else 0,
            teacher=teacher_lora,
            learns=learns,
            device=device,
        )
    weights = Weights(
        stack,
        TensorFiles(resolve(model.encoder)),
        open_decoder(model),
        seed=config.run.seed,
        projection_init=model.projection_init,
        start=start,
        frozen=frozen,
        teacher=teacher,
    )
    return stack, weights


def build_tokenizer(config: Config, stack: Stack) -> PairTokenizer:
    """Both tokenizers; they cut a text for those who read it: student and teacher, or
    `objective.reader` alone.

    Raises:
        ValueError: A tokenizer is missing or has more ids than its model has embeddings.
    """
    tokenizer = PairTokenizer(
        resolve(config.model.encoder),
        resolve(config.model.decoder),
        max_length=config.data.max_length,
        truncation=config.data.truncation,
        parts=config.data.parts,
        encoder_prefix=config.model.encoder_prefix,
        reader=None if config.objective.kind == "distil" else config.objective.reader,
    )
    sides = [("model.decoder", tokenizer.largest_teacher_id, stack.decoder.embedding)]
    if stack.reads_stack:
        sides.append(("model.encoder", tokenizer.largest_student_id, stack.encoder.embedding))
    for key, largest, embedding in sides:
        if largest >= embedding.num_embeddings:
            ids = f"the tokenizer has ids up to {largest}"
            raise ValueError(f"{key}: {ids}, the model {embedding.num_embeddings} embeddings")
    return tokenizer


def check_adapters(config: Config, start: TensorFiles) -> None:
    """Raises: ValueError: The adapters have another shape, or were applied with another factor."""
    if ADAPTERS not in {path.name for path in start.paths}:
        return
    saved = read_lora(start.folder)
    for key in ("rank", "alpha", "rslora", "target_modules"):
        before, now = getattr(saved, key), getattr(config.lora, key)
        if set(before) != set(now) if key == "target_modules" else before != now:
            source = f"model.init_from={start.folder}"
            raise ValueError(f"lora.{key} is {now}, and {before} in {source}; set it to that")


def read_models(config: ModelConfig) -> tuple[PreTrainedConfig, DecoderSpec]:
    """What both models' configurations say; no weight is read.

    Raises:
        ValueError: One cannot be read, or is of another architecture.
    """
    encoder = read_encoder(resolve(config.encoder))
    folder = resolve(config.decoder)
    decoder = read_config(folder, "model.decoder")
    return encoder, decoder_spec(decoder, f"model.decoder: {folder}")


def read_encoder(folder: Path) -> PreTrainedConfig:
    """An encoder's config.json.

    Raises:
        ValueError: It cannot be read, or is of no family that goes in.
    """
    config = read_config(folder, "model.encoder")
    kind, takes = config.model_type, (M2M100Config.model_type, *PADDED)
    if kind not in takes:
        reason = f", which does not go in: {MIXTURE}" if has_experts(config) else ""
        known = f"this takes {', '.join(takes)}"
        raise ValueError(f"model.encoder: {folder} is a {kind} model{reason}; {known}")
    if kind in PADDED:
        try:
            check_encoder(config)
        except ValueError as error:
            raise ValueError(f"model.encoder: {folder}: {error}") from None
    return config


def longest_text(encoder: PreTrainedConfig) -> int | None:
    """How many tokens an encoder reads at most; None: any number."""
    if isinstance(encoder, M2M100Config):
        return encoder.max_position_embeddings
    count = PADDED[encoder.model_type].num_positions
    return count(encoder) if count else None


def settle(config: Config) -> Config:
    """The configuration with what its [lora] leaves open: the adapters of a sum as they are, and
    all linears of the LLM's family where all of Llama's are asked for.

    Raises:
        ValueError: A part of a sum has no adapters, or [lora] asks for others, or for linears that
            the LLM does not have.
    """
    config = sums.settle(config)
    folder = resolve(config.model.decoder)
    spec = decoder_spec(read_config(folder, "model.decoder"), f"model.decoder: {folder}")
    return with_targets(config, spec, str(folder))


def with_targets(config: Config, spec: DecoderSpec, name: str) -> Config:
    """The configuration with the linears of the LLM's family where all of Llama's are asked for.

    Args:
        name: Of the LLM, for messages.

    Raises:
        ValueError: It names linears that the LLM does not have.
    """
    targets = config.lora.target_modules
    if set(targets) == set(LORA_TARGETS):
        targets = targets if spec.targets == LORA_TARGETS else spec.targets
    for each in targets:
        if each not in spec.targets:
            known = f"{name} ({spec.family}) has {', '.join(spec.targets)}"
            raise ValueError(f"lora.target_modules: {each!r} is no linear of the LLM; {known}")
    return replace(config, lora=replace(config.lora, target_modules=targets))


def load_config(folder: Path, kind: type[PreTrainedConfig], key: str) -> PreTrainedConfig:
    """A model's config.json; none of its code is run.

    Args:
        key: Where the user named the folder.

    Raises:
        ValueError: It cannot be read, or is another kind's or a quantised model's.
    """
    config = read_config(folder, key)
    if not isinstance(config, kind):
        reason = f", which does not go in: {why_not(config)}" if why_not(config) else ""
        model_type = f"a {config.model_type} model{reason}; this takes {kind.model_type}"
        raise ValueError(f"{key}: {folder} is {model_type}")
    return config


def check_configs(config: Config, encoder: PreTrainedConfig, decoder: DecoderSpec) -> None:
    """Raises: ValueError: What is asked for is beyond what one of the models can do."""
    if config.model.causal and decoder.is_bidirectional:
        trained = "model.decoder was trained with attention from both sides"
        raise ValueError(f"model.causal=true, and {trained}; set it to false")
    if isinstance(encoder, M2M100Config):
        _check_m2m100(encoder)
    length, positions = config.data.max_length, longest_text(encoder)
    if positions is not None and length > positions:
        raise ValueError(f"data.max_length={length} is above the {positions} of model.encoder")
    if length > decoder.max_length:
        limit = f"the {decoder.limit}={decoder.max_length} of model.decoder"
        raise ValueError(f"data.max_length={length} is above {limit}")


def _check_m2m100(config: M2M100Config) -> None:
    activation, heads = config.activation_function, config.encoder_attention_heads
    if activation not in ACTIVATIONS:
        raise ValueError(f"model.encoder: activation {activation!r} is not supported")
    if config.pad_token_id is None:
        fix = "positions count from it: set it to the tokenizer's, 1 of NLLB"
        raise ValueError(f"model.encoder: pad_token_id is null in its config.json, and {fix}")
    if config.d_model % heads:
        width = f"its width {config.d_model} is no multiple of its {heads} heads"
        raise ValueError(f"model.encoder: {width}")
