"""What people run today, for comparison: the same method made from transformers, PEFT and Liger.

`padded` is the reference code with current libraries: two padded passes of the LLM. `unpadded` is
the best that one can assemble from published parts: the same two passes without padding, on torch's
varlen_attn and Liger's kernels.
Source: arXiv 2406.12739 and its code, read for what it computes; everything here uses the
libraries' public interfaces.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mtllm_engine.kernels.attention import grouped
from torch import nn
from transformers import AttentionInterface, AutoModel, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.m2m_100.modeling_m2m_100 import (
    M2M100Encoder,
    M2M100SinusoidalPositionalEmbedding,
)

from benchmarks.measure import Part, patched
from benchmarks.models import Models, frozen_tensors
from benchmarks.providers import import_peft
from mtllm_engine.config import Config
from mtllm_engine.data.batch import IDLE, Document, Pack, join
from mtllm_engine.data.stream import GlobalBatch
from mtllm_engine.model.padded import PaddedEncoder
from mtllm_engine.model.weights import saved_name
from mtllm_engine.training.engine import PlainEngine, ZeroEngine, import_deepspeed
from mtllm_engine.world import World

if TYPE_CHECKING:
    from peft import PeftModel

BATCH = 32  # documents: the reference's batch on each GPU


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Documents padded on the right to the longest, as transformers takes them."""

    ids_BL: torch.Tensor
    real_BL: torch.Tensor  # bool
    full: bool  # nothing is padding
    causal: bool

    @property
    def encoder_inputs(self) -> dict[str, Any]:
        return {"attention_mask": self.real_BL}

    @property
    def decoder_inputs(self) -> dict[str, Any]:
        """Attention to both sides needs the whole mask, (B, 1, L, L): of (B, L) transformers makes
        a causal one."""
        if self.causal:
            return {"attention_mask": self.real_BL}
        mask_B1LL = self.real_BL[:, None, None, :].expand(-1, -1, self.ids_BL.shape[1], -1)
        return {"attention_mask": None if self.full else mask_B1LL, "is_causal": False}

    def pool(self, states_BLD: torch.Tensor) -> torch.Tensor:
        sums_BD = (states_BLD.float() * self.real_BL[..., None]).sum(1)
        return sums_BD / self.real_BL.sum(1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Documents joined in a batch of one, with what transformers passes on to FlashAttention."""

    ids_BL: torch.Tensor  # (1, S)
    positions_BL: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int
    causal: bool

    @property
    def encoder_inputs(self) -> dict[str, Any]:
        documents = {"cu_seq_lens_q": self.cu_seqlens, "max_length_q": self.longest}
        return {**documents, "position_ids": self.positions_BL, "is_causal": False}

    @property
    def decoder_inputs(self) -> dict[str, Any]:
        return self.encoder_inputs | {"is_causal": self.causal}

    def pool(self, states_BLD: torch.Tensor) -> torch.Tensor:
        lengths_P = self.cu_seqlens.diff()
        owner_S = torch.repeat_interleave(lengths_P, output_size=states_BLD.shape[1])
        sums_PD = states_BLD.new_zeros(len(lengths_P), states_BLD.shape[2]).float()
        return sums_PD.index_add(0, owner_S, states_BLD[0].float()) / lengths_P[:, None]


Micro = tuple[Padded | Joined, Padded | Joined, torch.Tensor]
"""Student, teacher, weights of the documents."""


class Distillation(nn.Module):
    """Encoder, projection, LLM; a call is a micro-batch's share of the loss, by two LLM passes."""

    def __init__(
        self, encoder: nn.Module, llm: "PeftModel", linear: nn.Linear, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.encoder, self.llm, self.linear, self.dtype = encoder, llm, linear, dtype

    def forward(self, batch: Micro, global_spans: int) -> torch.Tensor:
        student, teacher, weight_P = batch
        student_PD, teacher_PD = self.pooled(student, teacher)
        error_P = (student_PD - teacher_PD).square().mean(1)
        return weight_P @ error_P / global_spans

    def pooled(
        self, student: Padded | Joined, teacher: Padded | Joined
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each document the student's state and the teacher's, fp32 (P, D)."""
        encoded_BLE = self.encode(student)
        teacher_PD = self.teach(teacher)
        return self.study(encoded_BLE, student), teacher_PD

    @torch.no_grad()
    def encode(self, tokens: Padded | Joined) -> torch.Tensor:
        return self.encoder(tokens.ids_BL, **tokens.encoder_inputs).last_hidden_state

    @torch.no_grad()
    def teach(self, tokens: Padded | Joined) -> torch.Tensor:
        with self.llm.disable_adapter():
            outputs = self.llm(input_ids=tokens.ids_BL, **tokens.decoder_inputs, use_cache=False)
        return tokens.pool(outputs.last_hidden_state)

    def study(self, encoded_BLE: torch.Tensor, tokens: Padded | Joined) -> torch.Tensor:
        """The fp32 adapters work in the base's dtype by autocast, as users run PEFT."""
        device, is_low = encoded_BLE.device.type, self.dtype != torch.float32
        with torch.autocast(device, self.dtype, enabled=is_low):
            embedded_BLD = self.linear(encoded_BLE)
            outputs = self.llm(inputs_embeds=embedded_BLD, **tokens.decoder_inputs, use_cache=False)
        return tokens.pool(outputs.last_hidden_state)


@dataclass(kw_only=True)
class Baseline:
    """A variant to time: `run` is its optimizer step."""

    name: str
    world: World
    module: Distillation
    engine: PlainEngine | ZeroEngine
    patches: list[tuple[Any, str, Any]]
    """What its libraries change for the whole process: set while it runs."""
    collate: Callable[[Sequence[Document]], Micro]
    batch: int  # of a micro-batch: documents where they are padded, tokens where they are not
    checkpointing: bool = False  # each layer of the LLM is computed again in backward
    compiled: bool = False  # each layer of the LLM, by torch.compile
    packed: bool = False
    by_length: bool = False
    padding: float | None = None  # not counted

    def batches(self, documents: Sequence[Document]) -> list[list[Document]]:
        if self.packed:
            packs = [Pack(documents=(document,), state={}) for document in documents]
            return join(packs, self.batch)
        if self.by_length:
            documents = sorted(documents, key=lambda document: document.num_tokens)
        starts = range(0, len(documents), self.batch)
        return [list(documents[start : start + self.batch]) for start in starts]

    def run(self, global_batch: GlobalBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the loss, and the gradient's norm; the learning rate is 0."""
        batches = self.batches(list(itertools.chain(*global_batch.micro_batches)))
        most = max(count for (count,) in self.world.gather_ints([len(batches)]))
        loss = torch.zeros((), device=self.world.device)
        self._set_up()  # anew: variants share a module
        with patched(*self.patches):
            for documents in batches + [[]] * (most - len(batches)):
                share = self.engine(self.collate(documents), global_batch.totals.spans)
                self.engine.backward(share)
                loss += share.detach()
            return loss, self.engine.step(0.0)

    def _set_up(self) -> None:
        llm = self.module.llm.get_base_model()
        if self.checkpointing != llm.is_gradient_checkpointing:
            switch = ("gradient_checkpointing_disable", "gradient_checkpointing_enable")
            options = ({"use_reentrant": False},) if self.checkpointing else ()
            getattr(llm, switch[self.checkpointing])(*options)
        for layer in llm.layers:
            if self.compiled and layer._compiled_call_impl is None:
                layer.compile(dynamic=True)  # packs differ in length from step to step
            elif not self.compiled:
                layer._compiled_call_impl = None

    @property
    def parts(self) -> list[Part]:
        passes = {"encode": "encoder", "teach": "teacher", "study": "student"}
        calls = {"backward": "backward", "step": "optimizer"}
        of_module = [(self.module, method, part) for method, part in passes.items()]
        return of_module + [(self.engine, method, part) for method, part in calls.items()]


def build_baselines(choice: str, config: Config, models: Models, world: World) -> list[Baseline]:
    """`unpadded`, `padded` (fed as documents come, and sorted by length), or `all` of them, the
    fastest first; none for an empty choice."""
    baselines = []
    if choice in ("unpadded", "all") and world.device.type == "cpu":
        message = "unpadded: skipped, varlen_attn and Liger's kernels run on CUDA alone"
        world.on_main(lambda: print(message))
    elif choice in ("unpadded", "all"):
        baselines.append(build_baseline("unpadded", config, models, world))
    if choice in ("padded", "all"):
        padded = build_baseline("padded", config, models, world)
        baselines += [padded, dataclasses.replace(padded, name="padded sorted", by_length=True)]
    return baselines


def build_baseline(name: str, config: Config, models: Models, world: World) -> Baseline:
    """Raises: ValueError: A library that it is made of is missing."""
    packed = name == "unpadded"
    linear = nn.functional.linear  # DeepSpeed sets its own, for the whole process
    module, patches = build_distillation(config, models, world, packed=packed)
    kind = PlainEngine if config.zero.stage == 0 else _Zero
    engine = kind(config, module, world)
    patches.append((nn.functional, "linear", nn.functional.linear))
    nn.functional.linear = linear
    batch = config.memory.max_tokens if packed else BATCH
    form = _join if packed else functools.partial(pad_documents, pad=models.encoder.pad_token_id)
    collate = functools.partial(_collate, form, causal=config.model.causal, device=world.device)
    runs = {"engine": engine, "patches": patches, "collate": collate}
    runs["checkpointing"] = config.memory.recompute == "layer"
    return Baseline(name=name, world=world, module=module, batch=batch, packed=packed, **runs)


def build_distillation(
    config: Config, models: Models, world: World, *, packed: bool
) -> tuple[Distillation, list[tuple[Any, str, Any]]]:
    """transformers' modules with our weights, which are not copied, and adapters of their own that
    start as `models.trained` says; and what must be patched while they run.
    """
    dtype = getattr(torch, config.model.dtype)
    # Copies: a configuration holds how its module attends.
    llm_config = copy.deepcopy(models.decoder)
    with torch.device("meta"):
        llm = AutoModel.from_config(llm_config, attn_implementation="sdpa")
    llm.rotary_emb = type(llm.rotary_emb)(models.decoder).to(world.device)
    if hasattr(llm.embed_tokens, "embed_scale"):
        scale = torch.tensor(llm.embed_tokens.scalar_embed_scale, device=world.device)
        llm.embed_tokens.embed_scale = scale
    _fill(llm, frozen_tensors(models, "decoder"), config)
    encoder = _build_encoder(config, models, world)
    patches = _assemble(encoder, llm) if packed else []
    peft = import_peft()
    adapters = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        use_rslora=config.lora.rslora,
        target_modules=list(config.lora.target_modules),
        lora_dropout=0.0,
    )
    bias = config.model.projection_bias
    linear = nn.Linear(
        models.encoder.hidden_size, models.decoder.hidden_size, bias=bias, device=world.device
    )
    module = Distillation(encoder.eval(), peft.get_peft_model(llm, adapters).train(), linear, dtype)
    _start(module, models, world)
    return module, patches


def _build_encoder(config: Config, models: Models, world: World) -> nn.Module:
    """A padded one is transformers' already, and ours is taken; M2M-100 is filled with ours."""
    if isinstance(models.stack.encoder, PaddedEncoder):
        return models.stack.encoder.module
    about = copy.deepcopy(models.encoder)
    with torch.device("meta"):
        encoder = M2M100Encoder._from_config(about, attn_implementation="sdpa")
    encoder.embed_positions = M2M100SinusoidalPositionalEmbedding(
        about.max_position_embeddings, about.d_model, about.pad_token_id
    ).to(world.device, getattr(torch, config.model.dtype))
    _fill(encoder, frozen_tensors(models, "encoder"), config)
    return encoder


def _fill(
    module: nn.Module, tensors: Mapping[str, Callable[[], torch.Tensor]], config: Config
) -> None:
    """Frozen weights into a module on the meta device; ZeRO-3 shards each part before the next."""
    for path, part in module.named_modules():
        for name in part._parameters:
            if part._parameters[name] is not None:
                value = tensors[f"{path}.{name}" if path else name]()
                part._parameters[name] = nn.Parameter(value, requires_grad=False)
        if part._parameters and config.zero.stage == 3:
            import_deepspeed().zero.Init(module=part, config_dict_or_path=_zero_config(config))


@torch.no_grad()
def _start(module: Distillation, models: Models, world: World) -> None:
    """The projection and adapters that `models.trained` gives."""
    ours = {name: state["value"].to(world.device) for name, state in models.trained.items()}
    theirs = dict(module.llm.named_parameters())
    for name, value in ours.items():
        if name.startswith("projection."):
            getattr(module.linear, name.removeprefix("projection.")).copy_(value)
        else:
            theirs[saved_name(name).replace(".weight", ".default.weight")].copy_(value)


class _Zero(ZeroEngine):
    """DeepSpeed ZeRO-3 as users set it up, with the options that its documentation starts from."""

    def __init__(self, config: Config, module: Distillation, world: World) -> None:
        self.stack, self.world = module, world
        optim = config.optim
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        self.engine, self.zero, *_ = import_deepspeed().initialize(
            model=module,
            optimizer=self.optimizer,
            config=_zero_config(config),
            dist_init_required=False,
        )


def _zero_config(config: Config) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "overlap_comm": on_gpu, "contiguous_gradients": True},
        "steps_per_print": 1 << 60,
    }


def _collate(
    form: Callable[..., Padded | Joined],
    documents: Sequence[Document],
    *,
    causal: bool,
    device: torch.device,
) -> Micro:
    """A rank without documents runs one of weight 0, so that all make the same collectives."""
    weight_P = torch.full((len(documents) or 1,), float(bool(documents)), device=device)
    documents = documents or [IDLE]
    student = form([document.student_ids_S for document in documents], causal=causal, device=device)
    teacher = form([document.teacher_ids_T for document in documents], causal=causal, device=device)
    return student, teacher, weight_P


def pad_documents(
    rows: Sequence[np.ndarray], *, pad: int, causal: bool, device: torch.device
) -> Padded:
    """Args: pad: The id that pads."""
    tensors = [torch.from_numpy(row).long() for row in rows]
    ids_BL = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)
    real_BL = torch.arange(ids_BL.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    full = bool(real_BL.all())
    return Padded(ids_BL=ids_BL.to(device), real_BL=real_BL.to(device), full=full, causal=causal)


def _join(rows: Sequence[np.ndarray], *, causal: bool, device: torch.device) -> Joined:
    lengths = [len(row) for row in rows]
    positions_S = np.concatenate([np.arange(length) for length in lengths])
    return Joined(
        ids_BL=torch.from_numpy(np.concatenate(rows)).long()[None].to(device),
        positions_BL=torch.from_numpy(positions_S)[None].to(device),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device),
        longest=max(lengths),
        causal=causal,
    )


def _assemble(encoder: nn.Module, llm: PreTrainedModel) -> list[tuple[Any, str, Any]]:
    """Makes both modules padding-free and gives the LLM Liger's kernels.

    Returns:
        What must be patched while they run.
    """
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise ValueError("unpadded needs Liger's kernels: pip install liger-kernel") from error
    if not isinstance(encoder, M2M100Encoder):
        raise ValueError("unpadded takes an M2M-100 encoder alone: others are run padded")
    if llm.config.model_type != "llama":
        raise ValueError(
            f"unpadded has Liger's kernels for llama alone, not {llm.config.model_type}"
        )
    AttentionInterface.register("varlen", _attend)
    for module in (encoder, llm):
        module.set_attn_implementation("varlen")
    encoder.embed_positions = _Positions(encoder.embed_positions.weights, encoder.padding_idx + 1)
    encoder.register_forward_pre_hook(encoder.embed_positions.look, with_kwargs=True)
    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    originals = {name: getattr(modeling_llama, name) for name in names}
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=llm)
    rope = modeling_llama.apply_rotary_pos_emb
    for name, value in originals.items():
        setattr(modeling_llama, name, value)
    return [(modeling_llama, "apply_rotary_pos_emb", rope)]


class _Positions(nn.Module):
    """M2M-100's positions, counted inside each document instead of along the row."""

    def __init__(self, table: torch.Tensor, first: int) -> None:
        super().__init__()
        self.table, self.first = table, first

    def look(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A hook before the encoder's forward."""
        self.positions_BL = kwargs["position_ids"]

    def forward(self, ids_BL: torch.Tensor, embedded_BLE: torch.Tensor) -> torch.Tensor:
        return self.table[self.positions_BL + self.first]


def _attend(
    module: nn.Module,
    q_BHLK: torch.Tensor,
    k_BGLK: torch.Tensor,
    v_BGLK: torch.Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    is_causal: bool,
    scaling: float,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it, for rows of joined documents."""
    from torch.nn.attention.varlen import varlen_attn

    q_SHK, k_SGK, v_SGK = (x[0].transpose(0, 1) for x in (q_BHLK, k_BGLK, v_BGLK))
    context_SHK = varlen_attn(
        *(q_SHK, k_SGK, v_SGK, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q),
        scale=scaling,
        window_size=(-1, 0) if is_causal else (-1, -1),
        **grouped(varlen_attn, q_SHK, k_SGK),
    )
    return context_SHK[None], None
