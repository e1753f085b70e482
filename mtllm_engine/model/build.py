"""From a configuration to the stack, what fills it, and the tokenizers that feed it."""

from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, M2M100Config, PreTrainedConfig

from mtllm_engine.config import Config
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.model.encoder import ACTIVATIONS
from mtllm_engine.model.merge import open_decoder
from mtllm_engine.model.objective import HeadSize
from mtllm_engine.model.peft import read_lora
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.sums import open_start, settle
from mtllm_engine.model.tensors import TensorFiles, resolve
from mtllm_engine.model.weights import ADAPTERS, Weights, checkpoint_tensors, has_head


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
    encoder_folder, decoder_folder = resolve(model.encoder), resolve(model.decoder)
    encoder = load_config(encoder_folder, M2M100Config, "model.encoder")
    decoder = load_config(decoder_folder, LlamaConfig, "model.decoder")
    _check_configs(config, encoder, decoder)
    start, frozen = open_start(config, learns=learns)
    teacher = checkpoint_tensors(model.teacher) if model.teacher else None
    if isinstance(start, TensorFiles):
        _check_adapters(config, start)
    # A head is copied from the teacher by what distils, and read by what only reads.
    if distils and teacher is None:
        head = None
    giver = teacher if distils else None if learns else start
    if head and giver and not has_head(giver):
        fix = "it takes a run of `mtllm finetune`"
        raise ValueError(f"{giver.folder} has no head.safetensors; {fix}")
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
        TensorFiles(encoder_folder),
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


def _check_adapters(config: Config, start: TensorFiles) -> None:
    """Raises: ValueError: The adapters have another shape, or were applied with another factor."""
    if ADAPTERS not in {path.name for path in start.paths}:
        return
    saved = read_lora(start.folder)
    for key in ("rank", "alpha", "rslora", "target_modules"):
        before, now = getattr(saved, key), getattr(config.lora, key)
        if set(before) != set(now) if key == "target_modules" else before != now:
            source = f"model.init_from={start.folder}"
            raise ValueError(f"lora.{key} is {now}, and {before} in {source}; set it to that")


def load_config(folder: Path, kind: type[PreTrainedConfig], key: str) -> PreTrainedConfig:
    """A model's config.json; none of its code is run.

    Args:
        key: Where the user named the folder.

    Raises:
        ValueError: It cannot be read, or is another kind's or a quantised model's.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, huggingface_hub's own, ...
        if "trust_remote_code" in str(error):
            takes = f"its own code, which is never run; this takes {kind.model_type}"
            raise ValueError(f"{key}: {folder} is a model of {takes}") from error
        reason = " ".join(str(error).split())
        raise ValueError(f"{key}: {folder} has no readable config.json: {reason}") from error
    if not isinstance(config, kind):
        model_type = f"a {config.model_type} model; this takes {kind.model_type}"
        raise ValueError(f"{key}: {folder} is {model_type}")
    if getattr(config, "quantization_config", None):
        takes = "this takes float32, bfloat16 or float16 weights"
        raise ValueError(f"{key}: {folder} is quantised; {takes}")
    return config


def _check_configs(config: Config, encoder: M2M100Config, decoder: LlamaConfig) -> None:
    activation, heads = encoder.activation_function, encoder.encoder_attention_heads
    if activation not in ACTIVATIONS:
        raise ValueError(f"model.encoder: activation {activation!r} is not supported")
    if encoder.d_model % heads:
        width = f"its width {encoder.d_model} is no multiple of its {heads} heads"
        raise ValueError(f"model.encoder: {width}")
    if decoder.hidden_act != "silu":
        activation = f"activation {decoder.hidden_act!r} is not supported; Llama has silu"
        raise ValueError(f"model.decoder: {activation}")
    length = config.data.max_length
    for key, model in (("encoder", encoder), ("decoder", decoder)):
        if length > (positions := model.max_position_embeddings):
            raise ValueError(f"data.max_length={length} is above the {positions} of model.{key}")
