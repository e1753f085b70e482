"""How long a step takes on GPUs that need not be there, and what bounds it. An estimate: a sum over
the step's operations, each as long as its arithmetic or its memory traffic takes.

FLOPs and bytes are the kernels' own (`Kernel.cost`). Peaks are the vendor's; which share of them is
reached was measured on one H200, kernel by kernel, and is taken to be the same elsewhere. Reading
data, validation and checkpoints are not in it.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mtllm_engine.config import Config
from mtllm_engine.data.stream import GlobalBatch
from mtllm_engine.kernels.attention import attention
from mtllm_engine.kernels.contract import Cost
from mtllm_engine.kernels.distill_loss import distill_loss
from mtllm_engine.kernels.lora_linear import lora_linear
from mtllm_engine.kernels.lora_linear.quantised import BYTES
from mtllm_engine.kernels.projection import projection
from mtllm_engine.kernels.rms_norm import rms_norm
from mtllm_engine.kernels.rope import rope
from mtllm_engine.kernels.swiglu import swiglu
from mtllm_engine.model.families import DecoderSpec
from mtllm_engine.model.padded import MAX_PADDING, PaddedEncoder
from mtllm_engine.training.gpus import SHARES, TILE, Cluster, Gpu
from mtllm_engine.training.log import pair_tokens
from mtllm_engine.training.memory import Models, pieces
from mtllm_engine.training.traffic import Command, Traffic, movements

LAUNCH_S = 6e-6
"""The host's time for a kernel, assumed; the device waits where its kernels are shorter."""
KERNELS = {"decoder": 120, "encoder": 14, "other": 60}
"""Of a layer and of the rest, in a micro-batch: 4,028 in step.jsonl, with 32 and 12 layers."""
OPTIMIZER_BYTES = 32
"""Of a trained number: its gradient twice, value and moments read and written, gradient zeroed."""


class Texts(NamedTuple):
    """Mean tokens of a document."""

    student: float
    teacher: float
    is_known: bool = True
    """Or documents were taken to be as long as they may be."""

    @property
    def longer(self) -> float:
        return max(self.student, self.teacher)


class Work(NamedTuple):
    """What the rank with most lanes does in a step."""

    packs: int
    micro_batches: int
    documents: float
    student: float
    """Tokens that the stack reads, or, where the LLM learns by itself, nobody."""
    teacher: float


class Op(NamedTuple):
    """One operation: of what part of a step, what bounds its arithmetic, and what it takes."""

    part: str
    kind: str
    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """A predicted step."""

    cluster: Cluster
    work: Work
    traffic: Traffic
    parts: Mapping[str, float]
    """Seconds of the device's work: encoder, teacher, student, backward, optimizer."""
    bounds: Mapping[str, float]
    """Seconds by what bounds them: compute, memory, network, launches; they add up to the step."""
    pairs: float
    """Pair tokens of a step, over all ranks."""
    flops: int
    """6N, of one of them."""

    @property
    def seconds(self) -> float:
        return sum(self.bounds.values())

    @property
    def pairs_per_s(self) -> float:
        return self.pairs / self.seconds

    @property
    def mfu(self) -> float:
        return self.flops * self.pairs_per_s / (1e12 * self.cluster.gpu.tflops * self.cluster.size)

    @property
    def bound(self) -> str:
        """In words: all that bounds a tenth of it or more."""
        order = sorted(self.bounds, key=lambda name: -self.bounds[name])
        shares = {name: self.bounds[name] / self.seconds for name in order}
        return ", ".join(f"{name} {each:.0%}" for name, each in shares.items() if each >= 0.1)


def work_of(config: Config, texts: Texts, world_size: int) -> Work:
    """Of a step, on the rank with most lanes. Packs of unknown texts are taken to be full."""
    data = config.data
    packs = math.ceil(data.lanes / world_size)
    documents = float(data.pack_documents)
    if data.pack_tokens:
        # What does not fit goes into the next pack, so half a document's room is left on average.
        room = data.pack_tokens - (texts.longer / 2 if texts.is_known else 0)
        documents = max(1.0, room / texts.longer)
    joined = max(1, int(config.memory.max_tokens / (documents * texts.longer) + 1e-9))
    return Work(
        packs=packs,
        micro_batches=math.ceil(packs / joined),
        documents=packs * documents,
        student=packs * documents * texts.student,
        teacher=packs * documents * texts.teacher,
    )


def work_of_batch(config: Config, batch: GlobalBatch, world_size: int) -> Work:
    """Of a step that is there, shared out evenly."""
    sizes = (batch.totals.documents, batch.student_tokens, batch.teacher_tokens)
    packs = math.ceil(config.data.lanes / world_size)
    share = packs / config.data.lanes
    return Work(packs, len(batch.micro_batches), *(share * size for size in sizes))


def predict(
    config: Config,
    models: Models,
    cluster: Cluster,
    work: Work,
    *,
    command: Command = "train",
    has_copies: bool = False,
) -> Step:
    """A step of a configuration whose `zero.stage` is 0 or 3.

    Args:
        work: Of one rank.
        has_copies: Each node has a second copy of the frozen weights, from which it gathers.
    """
    parts: Counter[str] = Counter()
    device: dict[str, Counter[str]] = {name: Counter() for name in PHASES.values()}
    for op in operations(config, models, work, cluster.size, command=command):
        seconds, bound = _seconds(op, cluster.gpu)
        parts[op.part] += seconds
        device[PHASES[op.part]][bound] += seconds
    options = {"command": command, "has_copies": has_copies}
    moved = movements(config, models, cluster, work.micro_batches, **options)
    launches_s = work.micro_batches * LAUNCH_S * _kernels(models) / 2
    bounds: Counter[str] = Counter()
    for phase, own in device.items():
        network_s = sum(each.seconds for each in moved if each.phase == phase)
        if phase == "update":  # nothing else runs then
            bounds.update({**own, "network": network_s})
        else:
            bounds.update(_longest(own, network_s, launches_s * (sum(own.values()) > 0)))
    read = _read(config, work, command)
    scale = config.data.lanes / work.packs
    return Step(
        cluster=cluster,
        work=work,
        traffic=Traffic(
            gathered=sum(each.bytes for each in moved if each.kind == "gathered"),
            reduced=sum(each.bytes for each in moved if each.kind == "reduced"),
        ),
        parts=dict(parts),
        bounds={name: seconds for name, seconds in bounds.items() if seconds},
        pairs=scale * pair_tokens(read.learning, read.taught),
        flops=6 * models.num_weights,
    )


class _Reading(NamedTuple):
    """Tokens of a step by what becomes of them."""

    encoder: float
    learning: float
    """By the LLM, forward and backward."""
    taught: float
    """By the LLM as the teacher, forward alone."""


def _read(config: Config, work: Work, command: Command) -> _Reading:
    if command != "train":
        is_stack = command == "read"
        return _Reading(work.student * is_stack, 0, work.student if is_stack else work.teacher)
    if config.objective.reader == "llm":
        return _Reading(0, work.teacher, 0)
    is_taught = config.objective.kind == "distil" and not config.data.teacher_states
    return _Reading(work.student, work.student, work.teacher * is_taught)


PHASES = {"encoder": "forward", "teacher": "forward", "student": "forward", "loss": "forward"}
PHASES |= {"backward": "backward", "optimizer": "update"}
"""Of a step's parts. Ranks gather the weights of a phase's next layers while it runs."""


def operations(
    config: Config, models: Models, work: Work, world_size: int, *, command: Command = "train"
) -> Iterator[Op]:
    """All that a rank's device does in a step."""
    count = work.micro_batches
    one = Work(work.packs, 1, *(each / count for each in work[2:]))
    reading, layers = _read(config, one, command), models.decoder.num_layers
    every: list[tuple[str, list[_Cost]]] = []
    if reading.encoder:
        every += [("encoder", _encoder(config, models, reading.encoder, one))]
    if reading.taught:
        block = _Block(config, models.decoder, reading.taught, one.documents)
        every += [("teacher", layers * block.forward(adapted=bool(config.model.teacher)))]
    if reading.learning:
        block = _Block(config, models.decoder, reading.learning, one.documents)
        every += [("student", layers * block.forward(adapted=True))]
        every += [("backward", layers * (block.again() + block.backward()))]
    if reading.learning and reading.taught:
        every += _loss(config, models.decoder, reading, one.documents)
    for part, costs in every:
        for kind, cost in costs:
            yield Op(part, kind, count * cost.flops, count * cost.bytes)
    if reading.learning:
        share = world_size if config.zero.stage == 3 else 1
        trained = sum(each.numbers for each in pieces(config, models.stack) if each.learns)
        yield Op("optimizer", "product", 0, OPTIMIZER_BYTES * trained / share)


_Cost = tuple[str, Cost]


class _Block:
    """A decoder layer on so many tokens of so many equally long documents."""

    def __init__(self, config: Config, spec: DecoderSpec, tokens: float, documents: float) -> None:
        self.config, self.spec = config, spec
        self.dtype, self.form = getattr(torch, config.model.dtype), config.model.quantization
        self.tokens, self.documents = round(tokens), documents
        q_width, kv_width = (num * spec.head_width for num in (spec.num_heads, spec.num_kv_heads))
        width, inner = spec.width, spec.inner_width
        self.linears = {
            "qkv": (width, (q_width, kv_width, kv_width)),
            "out": (q_width, (width,)),
            "gate_up": (width, (inner, inner)),
            "down": (inner, (width,)),
        }

    def forward(self, *, adapted: bool) -> list[_Cost]:
        found = [self._attention()[0], *self._passes(0)]
        for name in self.linears:
            found += self._linear(name, 0, adapted=adapted)
        return found

    def backward(self) -> list[_Cost]:
        """With what backward makes again; see `memory.recompute`."""
        found = [self._attention()[1], *self._passes(1)]
        for name in self.linears:
            found += self._linear(name, 1, adapted=True)
        return found

    def again(self) -> list[_Cost]:
        """What backward computes once more."""
        kind = self.config.memory.recompute
        if kind == "layer":
            return self.forward(adapted=True)
        found = [_pass(swiglu.cost(self.dtype, tokens=self.tokens, width=self.spec.inner_width)[0])]
        found += [_pass(each[0]) for each in self._norms(residual=False)]
        return found + (self._linear("gate_up", 0, adapted=True) if kind == "mlp" else [])

    def _linear(self, name: str, side: int, *, adapted: bool) -> list[_Cost]:
        """A fused linear: its frozen product, its adapters, what its form takes. Args: side: 0
        forward, 1 backward."""
        in_width, members = self.linears[name]
        rank, names = self.config.lora.rank, self.spec.linears[name]
        targets = [each.split(".")[-1] in self.config.lora.target_modules for each in names]
        shape = {"tokens": self.tokens, "width": in_width, "dropout": 0.0, "bias": False}
        options = {**shape, "members": members, "rank": rank}
        frozen = lora_linear.cost(self.dtype, **options, adapted=())[side]
        kind = "fp8 product" if self.form == "fp8" else "product"
        found = [(kind, frozen), *self._form(in_width, sum(members), side)]
        if adapted and any(targets):
            indices = tuple(range(len(members))) if all(targets) else (0,)
            low = lora_linear.cost(self.dtype, **options, adapted=indices)[side]
            # Forward reads the input again and adds to the output; backward reads the output's
            # gradient twice and the input, and adds to the input's gradient.
            numbers = in_width + 2 * sum(members) + 2 * in_width * side
            moved = self.tokens * numbers * self.dtype.itemsize
            found.append(("adapters", Cost(bytes=moved, flops=low.flops - frozen.flops)))
        return found

    def _form(self, in_width: int, out_width: int, side: int) -> list[_Cost]:
        """What a quantised weight takes before its product."""
        weights = in_width * out_width
        if self.form == "fp8":  # what comes in is read, and written in a byte
            moved = self.tokens * (out_width if side else in_width) * (self.dtype.itemsize + 1)
            if side and self.config.zero.stage == 3:  # and the weight's transpose is made
                moved += 2 * weights
            return [_pass(Cost(bytes=moved, flops=0))]
        if self.form == "nf4":  # made full, then read by the product like any other
            return [_pass(Cost(bytes=int(weights * (BYTES["nf4"] + self.dtype.itemsize)), flops=0))]
        return []

    def _attention(self) -> tuple[_Cost, _Cost]:
        spec, length = self.spec, self.tokens / self.documents
        heads = {"heads": spec.num_heads, "kv_heads": spec.num_kv_heads, "width": spec.head_width}
        costs = _attention(self.dtype, length, self.documents, self.config.model.causal, heads)
        return ("attention", costs[0]), ("attention backward", costs[1])

    def _norms(self, *, residual: bool) -> list[tuple[Cost, Cost]]:
        """Of the layer's norms. Args: residual: The MLP's adds the layer's input first."""
        found = []
        for name in self.spec.norms:
            tokens, width = self.tokens, self.spec.width
            if name in ("q_norm", "k_norm"):
                heads = self.spec.num_heads if name == "q_norm" else self.spec.num_kv_heads
                tokens, width = tokens * heads, self.spec.head_width
            adds = residual and name == "mlp_norm"
            found.append(rms_norm.cost(self.dtype, tokens=tokens, width=width, residual=adds))
        return found

    def _passes(self, side: int) -> list[_Cost]:
        """What reads and writes states and multiplies nothing. Args: as of `_linear`."""
        spec, dtype, tokens = self.spec, self.dtype, self.tokens
        rotated = spec.num_heads + spec.num_kv_heads
        heads = {"heads": rotated + spec.num_kv_heads, "rotated": rotated, "width": spec.head_width}
        every = self._norms(residual=True)
        every += [rope.cost(dtype, tokens=tokens, **heads)]
        every += [swiglu.cost(dtype, tokens=tokens, width=spec.inner_width)]
        # The layer's sum in forward; in backward each half's gradient joins the residual's.
        sums = Cost(bytes=3 * (1 + side) * tokens * spec.width * dtype.itemsize, flops=0)
        return [*(_pass(each[side]) for each in every), _pass(sums)]


def _pass(cost: Cost) -> _Cost:
    """Bound by memory, whatever little it computes."""
    return "product", Cost(bytes=cost.bytes, flops=0)


def _attention(
    dtype: torch.dtype, length: float, documents: float, causal: bool, heads: Mapping[str, int]
) -> tuple[Cost, Cost]:
    """Of documents of one length, in whole tiles."""
    tiles = TILE * math.ceil(length / TILE)
    moved = attention.cost(dtype, lengths=(round(length * documents),), causal=causal, **heads)
    worked = attention.cost(dtype, lengths=(tiles,), causal=causal, **heads)
    forward, backward = (
        Cost(bytes=one.bytes, flops=int(two.flops * documents)) for one, two in zip(moved, worked)
    )
    return forward, backward


def _encoder(config: Config, models: Models, tokens: float, work: Work) -> list[_Cost]:
    """The encoder's forward and the projection's."""
    like, encoder = models.encoder, models.stack.encoder
    dtype, width = getattr(torch, config.model.dtype), like.hidden_size
    is_padded = isinstance(encoder, PaddedEncoder)
    matrices = [item.weight for item in encoder.linears] if is_padded else []
    if not is_padded:
        matrices = [item for item in encoder.layers.parameters() if item.dim() == 2]
    run = round(tokens / (1 - MAX_PADDING * is_padded))
    weights, outputs = sum(each.numel() for each in matrices), sum(map(len, matrices))
    # Each linear's input and output, two norms, two sums and an activation.
    layers = like.num_hidden_layers
    states = 2 * outputs + layers * 12 * width
    heads = like.num_attention_heads
    shape = {"heads": heads, "kv_heads": heads, "width": max(1, width // heads)}
    attended, _ = _attention(dtype, run / work.documents, work.documents, False, shape)
    linear = Cost(bytes=(weights + run * states) * dtype.itemsize, flops=2 * run * weights)
    sizes = {"tokens": run, "width": width, "out_width": models.decoder.width}
    projected, _ = projection.cost(dtype, **sizes, bias=True, grad=False)
    return [("product", linear), *(layers * [("attention", attended)]), ("product", projected)]


def _loss(
    config: Config, spec: DecoderSpec, reading: _Reading, documents: float
) -> list[tuple[str, list[_Cost]]]:
    count = max(1, round(documents))
    sides = {
        name: (max(1, round(tokens / count)),) * count
        for name, tokens in (("student", reading.learning), ("teacher", reading.taught))
    }
    dtype, aligned = getattr(torch, config.model.dtype), config.objective.token_weight > 0
    costs = distill_loss.cost(dtype, width=spec.width, gap=0, aligned=aligned, **sides)
    return [("loss", [_pass(costs[0])]), ("backward", [_pass(costs[1])])]


def _seconds(op: Op, gpu: Gpu) -> tuple[float, str]:
    """How long an operation takes, and what bounds it."""
    peak = gpu.fp8_tflops or gpu.tflops if op.kind == "fp8 product" else gpu.tflops
    compute_s = op.flops / (1e12 * peak * SHARES[op.kind])
    share = SHARES["adapters" if op.kind == "adapters" else "memory"]
    memory_s = op.bytes / (1e9 * gpu.gbytes_per_s * share)
    return max((compute_s, "compute"), (memory_s, "memory"))


def _longest(
    device: Mapping[str, float], network_s: float, launches_s: float
) -> Mapping[str, float]:
    """What a phase takes: the device, the network and the host work at the same time."""
    own = sum(device.values())
    if own >= max(network_s, launches_s):
        return device
    return {"network": network_s} if network_s > launches_s else {"launches": launches_s}


def _kernels(models: Models) -> int:
    encoder = models.encoder.num_hidden_layers if models.stack.reads_stack else 0
    layers = models.decoder.num_layers
    return KERNELS["decoder"] * layers + KERNELS["encoder"] * encoder + KERNELS["other"]
