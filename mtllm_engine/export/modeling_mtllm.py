"""MT-LLM: a multilingual encoder under an LLM, on transformers' own classes.

    model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
    model.encode(["Habari ya dunia"], language="swh_Latn")        # float32 (1, D)

A text is read by the encoder; a linear projection takes its states to the LLM, which goes on with
adapters (LoRA) beside its linears; the mean of its states is the text's vector. texts_mtllm.py says
which tokens a text is. Source: arXiv 2406.12739.

Letters of shapes: N texts, B texts of a batch, L their padded length, U tokens that the encoder
reads, Q parts, D and E the widths of LLM and encoder, R of adapters, F of a linear's output, Y
classes.
"""

import contextlib
import importlib
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file

from .texts_mtllm import SEPARATOR, open_tokenizer, padded, student_side, teacher_side

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class MTLLMConfig(PreTrainedConfig):
    """How a text is read.

    Args:
        causal: Whether a token of the LLM sees only those before it.
        max_length: Tokens of the longest text.
        truncation: "aligned": a longer one ends with a word. "independent": it is its first tokens.
        parts: What the encoder reads one by one: the "whole" text, its "lines" or its "sentences".
        encoder_prefix: Put before each of these.
        languages: Codes of FLORES-200's form that the encoder knows.
        language_tokens: Code -> the encoder's token for it; {}: it is not told the language, and
            None: as NLLB calls `languages`.
        language_last: Whether that token stands behind the end of a text, not before the text.
        fallback: Codes that are read as another language.
        teacher: The folder of what the student learned to be like: "teacher", an LLM fine-tuned for
            a task, or "llm", the bare one; "" where it is no longer there.
        merged: Whether the student's adapters are in the LLM's weights.
        tasks: By name: "kind", "num_outputs", "labels", "folder".
    """

    model_type = "mtllm"

    def __init__(
        self,
        *,
        causal: bool = False,
        projection_bias: bool = True,
        max_length: int = 512,
        truncation: str = "aligned",
        parts: str = "whole",
        encoder_prefix: str = "",
        languages: Sequence[str] = (),
        language_tokens: dict[str, str] | None = None,
        language_last: bool = False,
        fallback: dict[str, str] | None = None,
        default_language: str = "",
        teacher: str = "llm",
        merged: bool = False,
        tasks: dict[str, dict] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.causal, self.projection_bias = causal, projection_bias
        self.max_length, self.truncation, self.parts = max_length, truncation, parts
        self.encoder_prefix = encoder_prefix
        self.languages, self.fallback = list(languages), fallback or {}
        self.language_tokens, self.language_last = language_tokens, language_last
        self.default_language = default_language
        self.teacher, self.merged, self.tasks = teacher, merged, tasks or {}


class Classified(NamedTuple):
    """A classification of N texts."""

    labels: list[str]
    probabilities: np.ndarray  # float32 (N, Y)
    names: tuple[str, ...]  # of the Y classes


class Adapted(nn.Module):
    """A linear of the LLM with sets of adapters beside it, fp32; those in `active` are added."""

    def __init__(self, linear: nn.Module, active: dict[str, None]) -> None:
        super().__init__()
        self.linear, self.active, self.scales = linear, active, dict[str, float]()
        self.sets = nn.ModuleDict()

    def add(self, name: str, a_RD: torch.Tensor, b_FR: torch.Tensor, scale: float) -> None:
        pair = (nn.Parameter(each.float(), requires_grad=False) for each in (a_RD, b_FR))
        self.sets[name], self.scales[name] = nn.ParameterList(pair), scale

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        y_BLF = self.linear(x_BLD)
        for name in filter(self.sets.__contains__, self.active):
            a_RD, b_FR = (each.to(x_BLD.device, x_BLD.dtype) for each in self.sets[name])
            low_BLR = functional.linear(x_BLD, a_RD)
            y_BLF = y_BLF + self.scales[name] * functional.linear(low_BLR, b_FR)
        return y_BLF


class MTLLMModel(PreTrainedModel):
    """The stack; beside its own adapters lie the teacher's and those of added tasks."""

    config_class = MTLLMConfig
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config: MTLLMConfig, encoder: PreTrainedModel, llm: PreTrainedModel) -> None:
        super().__init__(config)
        self.encoder, self.llm = encoder, llm
        width, bias = llm.config.hidden_size, config.projection_bias
        self.projection = nn.Linear(encoder.config.hidden_size, width, bias=bias)
        self.heads = nn.ParameterDict()
        self._tokenizers: list[Any] = []
        self._active: dict[str, None] = {"student": None}  # sets of adapters, by their folders

    @classmethod
    def from_pretrained(cls, name: str, *_, config: MTLLMConfig | None = None, **options: Any):
        """Opens a folder or hub id. Args: options: transformers' own; both models get them."""
        for unused in ("trust_remote_code", "adapter_kwargs", "_from_auto", "code_revision"):
            options.pop(unused, None)
        hub = {key: options.pop(key) for key in HUB if key in options}
        config = config or MTLLMConfig.from_pretrained(name, **hub)
        options["dtype"] = options.get("dtype") or options.pop("torch_dtype", None) or config.dtype
        if config._attn_implementation:
            options.setdefault("attn_implementation", config._attn_implementation)
        encoder = _open_encoder(name, **options, **hub)
        llm = AutoModel.from_pretrained(name, subfolder="llm", **options, **hub)
        model = cls(config, encoder, llm)
        model._load(name, hub)
        return model.eval()

    def save_pretrained(self, *_, **__) -> None:
        raise NotImplementedError("copy the folder that this was opened from: it is all there is")

    def encode(
        self,
        texts: Sequence[str],
        language: str | Sequence[str] | None = None,
        *,
        reader: str = "student",
        normalize: bool = False,
        batch_size: int = 32,
    ) -> np.ndarray:
        """The vectors of texts, float32 (N, D), in their order.

        Args:
            language: Of all texts, or of each; by default the configuration's `default_language`.
                An encoder that is not told it needs none.
            reader: "student", or "teacher": what it learned to be like, the LLM reading its own
                tokens, which needs no language. Their vectors are of one space.
            normalize: To length 1.

        Raises:
            ValueError: A language is missing or unknown, or the teacher is not there.
        """
        vectors_ND = self._vectors(texts, language, reader, (reader,), batch_size)
        return (functional.normalize(vectors_ND) if normalize else vectors_ND).numpy()

    def classify(
        self,
        texts: Sequence[str | tuple[str, str]],
        language: str | Sequence[str] | None = None,
        task: str = "",
        *,
        batch_size: int = 32,
    ) -> Classified:
        """The classes of texts, or of pairs where a task compares two.

        Args:
            task: By default the only one.

        Raises:
            ValueError: There is no such task, it is none of classes, or as `encode`.
        """
        tasks = self.config.tasks
        task = task or (next(iter(tasks)) if len(tasks) == 1 else "")
        if tasks.get(task, {}).get("kind") != "classification":
            has = ", ".join(f"{name} ({about['kind']})" for name, about in tasks.items()) or "none"
            raise ValueError(f"there is no classification task {task!r}; this model has {has}")
        sets = ("student", tasks[task]["folder"])
        vectors_ND = self._vectors(texts, language, "student", sets, batch_size)
        scores_NY = functional.linear(vectors_ND, self.heads[task].float().cpu())
        names = tuple(tasks[task]["labels"])
        labels = [names[index] for index in scores_NY.argmax(1)]
        return Classified(labels, scores_NY.softmax(1).numpy(), names)

    def tokenize(
        self, texts: Sequence[str], language: str | Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """What `forward` takes: `input_ids`, `attention_mask` and `part_ids`, int64 (B, L)."""
        return padded(self._readings(texts, language, "student"))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        part_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """The student's states of what `tokenize` gives, and their mean.

        Args:
            input_ids: The encoder's tokens, and where `part_ids` is 0 the LLM's.
            part_ids: The encoder reads each part by itself; by default a text is one.
        """
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        part_BL = mask_BL if part_ids is None else part_ids * mask_BL
        is_encoded_BL = part_BL > 0
        states_UE = self._encode_parts(input_ids, part_BL)
        weights = (each.to(states_UE.dtype) for each in self.projection.parameters())
        states_UD = functional.linear(states_UE, *weights)
        between_BL = input_ids.masked_fill(is_encoded_BL | (mask_BL == 0), 0)
        embedded_BLD = self.llm.get_input_embeddings()(between_BL)
        states_UD = states_UD.to(embedded_BLD.device, embedded_BLD.dtype)
        embedded_BLD = embedded_BLD.masked_scatter(is_encoded_BL[..., None], states_UD)
        return self._run_llm(mask_BL, inputs_embeds=embedded_BLD)

    def _encode_parts(self, ids_BL: torch.Tensor, part_BL: torch.Tensor) -> torch.Tensor:
        """The encoder's states (U, E) of all texts' parts, one after the other."""
        row_BL = torch.arange(len(ids_BL), device=ids_BL.device)[:, None] * (part_BL.max() + 1)
        part_U = (row_BL + part_BL)[part_BL > 0]
        _, part_U, length_Q = part_U.unique_consecutive(return_inverse=True, return_counts=True)
        first_Q = length_Q.cumsum(0) - length_Q
        place_U = torch.arange(len(part_U), device=ids_BL.device) - first_Q[part_U]
        shape = (len(length_Q), int(length_Q.max()))
        ids_QL = ids_BL.new_full(shape, self.encoder.config.pad_token_id or 0)
        ids_QL[part_U, place_U] = ids_BL[part_BL > 0]
        mask_QL = torch.arange(shape[1], device=ids_BL.device) < length_Q[:, None]
        states_QLE = self.encoder(ids_QL, attention_mask=mask_QL.long()).last_hidden_state
        return states_QLE[part_U, place_U]

    def _run_llm(self, mask_BL: torch.Tensor, **inputs: torch.Tensor) -> BaseModelOutputWithPooling:
        position_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        options = {"position_ids": position_BL, "use_cache": False, "is_causal": self.config.causal}
        states_BLD = self.llm(**inputs, attention_mask=mask_BL, **options).last_hidden_state
        weight_BL1 = mask_BL[..., None].to(states_BLD.device).float()
        pooled_BD = (states_BLD.float() * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)
        return BaseModelOutputWithPooling(last_hidden_state=states_BLD, pooler_output=pooled_BD)

    @torch.no_grad()
    def _vectors(
        self, texts: Sequence[Any], language: Any, reader: str, sets: Sequence[str], batch_size: int
    ) -> torch.Tensor:
        """fp32 (N, D), on the CPU. Args: sets: of adapters that run."""
        readings = self._readings(texts, language, reader)
        vectors_ND = torch.empty(len(readings), self.llm.config.hidden_size)
        by_length = sorted(range(len(readings)), key=lambda index: len(readings[index][0]))
        with self._running(sets):
            for start in range(0, len(by_length), batch_size):
                chosen = by_length[start : start + batch_size]
                batch = padded([readings[index] for index in chosen])
                batch = {name: each.to(self.device) for name, each in batch.items()}
                if reader == "student":
                    output = self(**batch)
                else:
                    output = self._run_llm(batch["attention_mask"], input_ids=batch["input_ids"])
                vectors_ND[chosen] = output.pooler_output.cpu()
        return vectors_ND

    @contextlib.contextmanager
    def _running(self, sets: Sequence[str]) -> Iterator[None]:
        """Meanwhile these sets of adapters run, and no others: in one thread at a time."""
        before = dict(self._active)
        self._active.clear()
        self._active.update(dict.fromkeys(sets))
        try:
            yield
        finally:
            self._active.clear()
            self._active.update(before)

    def _readings(
        self, texts: Sequence[Any], language: str | Sequence[str] | None, reader: str
    ) -> list[tuple[list[int], list[int]]]:
        if isinstance(texts, str):
            raise ValueError("texts is one text; write a list: [text]")
        texts = list(texts)
        for number, text in enumerate(texts):
            is_pair = isinstance(text, tuple | list) and len(text) == 2
            if not all(isinstance(each, str) for each in (text if is_pair else [text])):
                kind = type(text).__name__
                raise ValueError(f"texts[{number}] is neither a text nor a pair of two, but {kind}")
        if reader not in ("student", "teacher"):
            raise ValueError(f'reader must be "student" or "teacher", not {reader!r}')
        is_one = language is None or isinstance(language, str) or reader == "teacher"
        languages = [language] * len(texts) if is_one else list(language)
        if len(languages) != len(texts):
            raise ValueError(f"{len(texts)} texts, and languages of {len(languages)}")
        encoder, llm = self._tokenizers
        sides = {
            each: student_side(self.config, encoder, llm, each)
            if reader == "student"
            else teacher_side(self.config, llm)
            for each in dict.fromkeys(languages)
        }
        pairs = [
            (text, "") if isinstance(text, str) else (text[0], SEPARATOR + text[1])
            for text in texts
        ]
        return [sides[each].read(*pair) for each, pair in zip(languages, pairs)]

    @torch.no_grad()
    def _load(self, name: str, hub: dict[str, Any]) -> None:
        """Tokenizers, projection, adapters and heads."""

        def path(folder: str, file: str) -> str:
            return cached_file(name, file, subfolder=folder, **hub)

        for folder in ("encoder", "llm"):
            self._tokenizers.append(open_tokenizer(name, subfolder=folder, **hub))
        self.projection.load_state_dict(load_file(path("student", "projection.safetensors")))
        self.projection.to(self.encoder.device)
        config, sets = self.config, {"student", "teacher"}
        sets -= {"student"} if config.merged else set()
        sets -= {"teacher"} if config.teacher != "teacher" else set()
        for task, about in config.tasks.items():
            head_YD = load_file(path(about["folder"], "head.safetensors"))["head.weight"]
            self.heads[task] = nn.Parameter(head_YD, requires_grad=False)
            sets |= {about["folder"]} - {"student"}
        for folder in sets:
            lora = json.loads(Path(path(folder, "adapter_config.json")).read_text())
            self._add(folder, lora, load_file(path(folder, "adapter_model.safetensors")))

    def _add(self, name: str, lora: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Puts a set of adapters beside the LLM's linears."""
        rank = math.sqrt(lora["r"]) if lora.get("use_rslora") else lora["r"]
        for saved in tensors:
            prefix, is_a, _ = saved.partition(".lora_A.weight")
            if is_a:
                path, _, linear = prefix.removeprefix("base_model.model.").rpartition(".")
                module = self.llm.get_submodule(path)
                if not isinstance(getattr(module, linear), Adapted):
                    setattr(module, linear, Adapted(getattr(module, linear), self._active))
                pair = (
                    tensors[each].to(self.llm.device) for each in (saved, f"{prefix}.lora_B.weight")
                )
                getattr(module, linear).add(name, *pair, lora["lora_alpha"] / rank)


def _open_encoder(name: str, **options: Any) -> PreTrainedModel:
    """By the class of transformers that its config.json names; it may be none of Auto's."""
    places = {key: options[key] for key in HUB if key in options}
    config = AutoConfig.from_pretrained(name, subfolder="encoder", **places)
    family = config.model_type.replace("-", "_")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = getattr(module, config.architectures[0])
    if "add_pooling_layer" in inspect.signature(kind).parameters:
        options["add_pooling_layer"] = False
    return kind.from_pretrained(name, subfolder="encoder", **options)
