"""The method as one would write it with transformers and PEFT, padded, to compare ours with."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import Phase, settings
from torch import nn
from transformers import LlamaModel, M2M100Model

from mtllm_engine.config import Config
from mtllm_engine.data.batch import Document
from mtllm_engine.model.build import build_stack
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.weights import saved_name
from mtllm_engine.train import find_task
from mtllm_engine.training.engine import shard
from tests.support.tiny import build_world

TOLERANCE = 1e-5
PAD = 1  # M2M-100's <pad>: transformers numbers positions by what is not that token
FEW = settings(
    max_examples=6, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate]
)


def load_llm(config: Config) -> LlamaModel:
    return LlamaModel.from_pretrained(config.model.decoder, attn_implementation="eager")


def build(config: Config) -> Stack:
    """Ours, with the head of the configuration's task if it has one."""
    task = find_task(config)
    stack, weights = build_stack(config, head=task.head_size if task else None)
    return shard(stack, weights, config, build_world())


def trained(stack: Stack) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in stack.named_parameters() if parameter.requires_grad
    }


@torch.no_grad()
def randomise(stack: Stack) -> Stack:
    """Gives what is trained values that show in the output, lora_B too."""
    generator = torch.Generator().manual_seed(3)
    for parameter in trained(stack).values():
        parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return stack


def their_name(name: str) -> str:
    """PEFT's, of our parameter."""
    is_plain = name.startswith("projection.")
    return name if is_plain else saved_name(name).replace(".weight", ".default.weight")


def pad(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L), padded on the right, and which are real: `x_BLD[real_BL]` is in packs'
    order."""
    rows = [torch.from_numpy(row).long() for row in rows]
    ids_BL = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BL, torch.arange(ids_BL.shape[1]) < lengths_B[:, None]


def attention_mask(real_BL: torch.Tensor, causal: bool) -> torch.Tensor:
    """transformers makes a causal mask of a 2-D one, and adds a 4-D one (B, 1, L, L) to the
    scores."""
    if causal:
        return real_BL.long()
    seen_B1LL = real_BL[:, None, None, :].expand(-1, -1, real_BL.shape[1], -1)
    return torch.zeros(seen_B1LL.shape).masked_fill(~seen_B1LL, torch.finfo(torch.float32).min)


def mean_pool(states_BLD: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
    return (states_BLD * real_BL[..., None]).sum(1) / real_BL.sum(1, keepdim=True)


class Padded:
    """The encoder, the LLM with adapters, and what of projection and head is needed."""

    def __init__(
        self,
        config: Config,
        llm: nn.Module,
        projection: nn.Linear | None = None,
        head: nn.Linear | None = None,
    ) -> None:
        options = {"attn_implementation": "eager"}
        self.encoder = M2M100Model.from_pretrained(config.model.encoder, **options).encoder
        self.llm, self.projection, self.head = llm.eval(), projection, head

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """By the names of PEFT's checkpoints and of our own parameters."""
        linears = {"projection": self.projection, "objective.head": self.head}
        parts = {prefix: linear.named_parameters() for prefix, linear in linears.items() if linear}
        named = {f"{prefix}.{name}": each for prefix, part in parts.items() for name, each in part}
        return named | dict(self.llm.named_parameters())

    def of(self, name: str) -> nn.Parameter:
        """Their parameter for our name."""
        return self.named[name if name in self.named else their_name(name)]

    def states(self, documents: Sequence[Document], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The last states (B, L, D) of the encoder's tokens (student) or the LLM's own (teacher),
        and which are real."""
        name = "student_ids_S" if side == "student" else "teacher_ids_T"
        ids_BL, real_BL = pad([getattr(item, name) for item in documents])
        inputs = {"input_ids": ids_BL}
        if side == "student" and documents[0].parts_Q2 is not None:
            rows = [self.interleaved(item) for item in documents]
            inputs = {"inputs_embeds": nn.utils.rnn.pad_sequence(rows, batch_first=True)}
        elif side == "student":
            inputs = {"inputs_embeds": self.projected(ids_BL, real_BL)}
        mask = attention_mask(real_BL, causal=False)
        return self.llm(**inputs, attention_mask=mask, use_cache=False).last_hidden_state, real_BL

    def projected(self, ids_BL: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            encoded_BLE = self.encoder(ids_BL, attention_mask=real_BL.long()).last_hidden_state
        return self.projection(encoded_BLE)

    def interleaved(self, document: Document) -> torch.Tensor:
        """A text in parts (S, D): each read by itself, the LLM's own embeddings between."""
        ids, embed, pieces, end = document.student_ids_S, self.llm.get_input_embeddings(), [], 0
        states_BLD = self.projected(*pad([ids[slice(*part)] for part in document.parts_Q2]))
        for (start, following), states_LD in zip(document.parts_Q2, states_BLD):
            pieces += [embed(torch.tensor(ids[end:start])), states_LD[: following - start]]
            end = following
        return torch.cat([*pieces, embed(torch.tensor(ids[end:]))])

    def pooled(self, documents: Sequence[Document], side: str) -> list[torch.Tensor]:
        """(P, D) of each document: the means of its spans, token by token from the definition."""
        states_BLD, _ = self.states(documents, side)
        pooled = []
        for states_LD, item in zip(states_BLD, documents):
            spans_P2 = getattr(item, f"{side}_spans_P2")
            pooled.append(torch.stack([states_LD[start:end].mean(0) for start, end in spans_P2]))
        return pooled

    def scores(self, documents: Sequence[Document], side: str, task: str) -> list[torch.Tensor]:
        """Of each document's classes, or of its own choices."""
        if task == "sib200":
            return list(self.head(mean_pool(*self.states(documents, side))))
        return [self.head(pooled_PD)[:, 0] for pooled_PD in self.pooled(documents, side)]


def assert_close(
    ours: torch.Tensor, theirs: torch.Tensor, name: str = "", largest: float | None = None
) -> None:
    """max|ours - theirs| <= 1e-5 max|theirs|."""
    assert ours.shape == theirs.shape, name
    error, largest = (ours - theirs).abs().max().item(), largest or theirs.abs().max().item()
    assert error <= TOLERANCE * largest, f"{name}: off by {error} of {largest}"


def largest_gradient(name: str, gradients: dict[str, torch.Tensor]) -> float:
    """Of the tensor itself; for q and k, whose gradients are small differences of large numbers, of
    its whole layer."""
    layer = name[: name.index("qkv.")] if "q_proj" in name or "k_proj" in name else name
    near = [gradient for other, gradient in gradients.items() if other.startswith(layer)]
    return max(gradient.abs().max().item() for gradient in near)
