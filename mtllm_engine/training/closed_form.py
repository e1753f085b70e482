"""The projection's start in closed form: encoder states onto the LLM's input embeddings of the same
words.

Least squares over the aligned tokens of the first documents that training would read (the authors'
second recipe of arXiv 2406.12739). It runs before the stack is sharded: each rank has the encoder
whole for as long as this takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from mtllm_engine.config import Config
from mtllm_engine.data.stream import Stream, agree, build_stream
from mtllm_engine.data.tokenizers import PairTokenizer
from mtllm_engine.model.stack import Stack
from mtllm_engine.model.weights import EMBEDDING, Weights
from mtllm_engine.training.engine import encoder_alone
from mtllm_engine.world import World

NUM_DOCUMENTS = 1024
SINGULAR = 1e-10  # of the largest eigenvalue: what fp32 states have below it is rounding

Pairs = tuple[torch.Tensor, torch.Tensor]
"""fp32: normed encoder states (S, E), the LLM's embeddings (S, D)."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The projection that starts training, and what it was fitted on."""

    weight_DE: torch.Tensor  # fp32, on the CPU; of all that fit equally well the smallest
    bias_D: torch.Tensor | None
    num_pairs: int
    num_singular: int
    """Directions in which the states do not vary, and which the projection leaves out."""

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """By the stack's names."""
        named = {"projection.weight": self.weight_DE, "projection.bias": self.bias_D}
        return {name: value for name, value in named.items() if value is not None}

    def __str__(self) -> str:
        pairs = f"least squares over {self.num_pairs:,} aligned tokens"
        left_out = f", singular directions left out: {self.num_singular}"
        return pairs + left_out * bool(self.num_singular)


def fit_projection(
    config: Config, world: World, stack: Stack, weights: Weights, tokenizer: PairTokenizer
) -> Fit:
    """The same bits on every rank. All ranks call it; each reads its share of the documents.

    Args:
        stack: Still on the meta device.

    Raises:
        ValueError: A document cannot be read, or no token of the documents is aligned.
    """
    data = replace(config.data, teacher_states="")
    stream = world.together(
        lambda: build_stream(
            data, tokenizer.read_by(None), world, seed=config.run.seed, aligns=True
        )
    )
    out_width, width = stack.projection.weight.shape
    sums = torch.zeros(width + 1, width + 1 + out_width, dtype=torch.float64, device=world.device)
    for states_SE, embeddings_SD in read_pairs(config, world, stack, weights, stream):
        inputs_SE = functional.pad(states_SE.double(), (0, 1), value=1.0)
        sums += inputs_SE.T @ torch.cat([inputs_SE, embeddings_SD.double()], dim=1)
    stream.close()
    sums = world.sum(sums).cpu()
    return world.on_main(lambda: solve(sums, bias=config.model.projection_bias))


@torch.no_grad()
def read_pairs(
    config: Config, world: World, stack: Stack, weights: Weights, stream: Stream
) -> Iterator[Pairs]:
    """This rank's pairs, a micro-batch at a time, in whole steps until all ranks have read
    `NUM_DOCUMENTS`, or as many as there are.
    """
    encode = world.together(lambda: encoder_alone(stack, weights, world))
    wanted = min(NUM_DOCUMENTS, sum(corpus.manifest.samples for corpus in stream.mixture.corpora))
    while wanted > 0:
        global_batch = agree(stream, world, config.memory.max_tokens)
        wanted -= global_batch.totals.documents
        for _, batch in global_batch.batches(world.device):
            aligned_U = (
                batch.aligned_S if batch.parts is None else batch.aligned_S[batch.parts.places_U]
            )
            is_aligned_U = aligned_U >= 0
            states_SE = encode(batch.encoder)[is_aligned_U].float()
            ids_S = batch.teacher.ids_S[aligned_U[is_aligned_U]].cpu().numpy()
            embeddings_SD = world.together(partial(_embeddings, weights, ids_S))
            yield states_SE, embeddings_SD.to(world.device)


def solve(sums: torch.Tensor, *, bias: bool) -> Fit:
    """The least-squares solution of smallest norm, from its normal equations.

    Normed states lie in a hyperplane, so with a bias one direction is always singular. A ridge
    would move all others.

    Args:
        sums: fp64 (E + 1, E + 1 + D): the products of [state, 1] with [state, 1, embedding], summed
            over pairs.

    Raises:
        ValueError: There are no pairs.
    """
    width, num_pairs = len(sums) - 1, int(sums[-1, len(sums) - 1])
    if not num_pairs:
        fix = 'set model.projection_init="embedding"'
        raise ValueError(f"no token of the documents is one for both tokenizers; {fix}")
    means = sums[-1] / num_pairs if bias else torch.zeros_like(sums[-1])
    centred = sums[:-1] - means[:width, None] * sums[-1]
    eigenvalues_E, vectors_EE = torch.linalg.eigh(centred[:, :width])
    is_kept_E = eigenvalues_E > SINGULAR * eigenvalues_E[-1]
    vectors = vectors_EE[:, is_kept_E]
    weight_ED = vectors @ (vectors.T @ centred[:, width + 1 :] / eigenvalues_E[is_kept_E, None])
    bias_D = means[width + 1 :] - means[:width] @ weight_ED
    return Fit(
        weight_DE=weight_ED.T.float().contiguous(),
        bias_D=bias_D.float() if bias else None,
        num_pairs=num_pairs,
        num_singular=int((~is_kept_E).sum()),
    )


def _embeddings(weights: Weights, ids_S: np.ndarray) -> torch.Tensor:
    """The LLM's input embeddings as they go in, fp32 (S, D); reads each distinct one once."""
    width = weights.shapes[EMBEDDING][1]
    distinct, index_S = np.unique(ids_S, return_inverse=True)
    rows = [
        weights.read(EMBEDDING, width * row, width * (row + 1)).float() for row in distinct.tolist()
    ]
    if not rows:
        return torch.empty(0, width)
    return torch.stack(rows)[torch.from_numpy(index_S)] * weights.embedding_scale
