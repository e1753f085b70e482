"""The encoder without an LLM: a linear head on its mean-pooled states, learned from the English
examples alone. What the stack has beyond it is the LLM's.

The head is multinomial logistic regression on standardised features. How strongly it is drawn to
zero is chosen on the English validation examples; nothing is drawn at random, so that every seed
answers alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mtllm_engine.config import Config
from mtllm_engine.data.batch import Batch, Document, Tokens, Totals
from mtllm_engine.evaluation.systems import Kind, read_corpus
from mtllm_engine.languages import ENGLISH
from mtllm_engine.model.build import build_stack, build_tokenizer
from mtllm_engine.model.objective import is_inside
from mtllm_engine.tasks import Task, pack_split
from mtllm_engine.training.engine import encoder_alone
from mtllm_engine.world import World

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Factors of half the weights' squares beside the mean cross-entropy. Of those that are right on as
many validation examples the strongest counts."""
PENALTY = 0.03
"""Where there are no validation examples."""
ITERATIONS = 500


class Examples(NamedTuple):
    """What a head is learned from."""

    features_NPE: torch.Tensor  # fp32: P is 1, or the choices, NaN for one that is not there
    labels_N: torch.Tensor  # int64


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Scores of pooled states: F is the classes, or 1, the score of each choice."""

    mean_E: torch.Tensor  # fp64, like the rest: of the features that it was learned from
    scale_E: torch.Tensor
    weight_FE: torch.Tensor
    bias_F: torch.Tensor

    def __call__(self, features_NPE: torch.Tensor) -> torch.Tensor:
        """fp64 (N, Y), -inf for a choice that is not there."""
        is_there_NP1 = features_NPE.isfinite().all(2, keepdim=True)
        features_NPE = features_NPE.double().where(is_there_NP1, self.mean_E)
        normed_NPE = (features_NPE - self.mean_E) / self.scale_E
        scores_NPF = functional.linear(normed_NPE, self.weight_FE, self.bias_F)
        return scores_NPF.where(is_there_NP1, float("-inf")).flatten(1)


class EncoderReader:
    """The encoder with a head for a task, loaded and taught once for all test sets; the LLM is not
    loaded.

    Raises:
        ValueError: The encoder or an English example cannot be read.
    """

    kind: Kind = "encoder"

    def __init__(self, config: Config, world: World, task: Task) -> None:
        model = replace(config.model, init_from=(), teacher="")
        objective = replace(config.objective, kind="finetune", reader="stack")
        self.config = replace(config, model=model, objective=objective)
        self.world = world
        stack, weights = world.together(lambda: build_stack(self.config, learns=False))
        self.tokenizer = world.together(lambda: build_tokenizer(self.config, stack))
        self.encode = world.together(lambda: encoder_alone(stack, weights, world))
        splits = [split for split in ("train", "validation") if getattr(config.task, split)]
        examples = [self._examples(self._packed(task, split)) for split in splits]
        kind, num_outputs = task.head_size
        shape = {"num_outputs": num_outputs, "per_choice": kind == "choice"}
        self.head = world.on_main(lambda: fit_head(*examples, **shape))

    def __call__(self, corpus: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Keys, labels (N,) and scores (N, Y), as `Reader` has them."""
        keys, labels, rows = self._read(corpus)
        return keys, labels, self.head(_stacked(rows)).numpy()

    def _packed(self, task: Task, split: str) -> Path:
        source, out = getattr(self.config.task, split), Path(self.config.run.dir) / "corpus" / split
        return self.world.on_main(lambda: pack_split(task, source, split, ENGLISH, out))

    def _examples(self, corpus: Path) -> Examples:
        _, labels, rows = self._read(corpus)
        is_labelled_N = labels >= 0
        return Examples(_stacked(rows)[is_labelled_N], torch.from_numpy(labels[is_labelled_N]))

    def _read(self, corpus: Path) -> tuple[list[str], np.ndarray, list[np.ndarray]]:
        return read_corpus(self.config, self.world, self.tokenizer, corpus, self._pool)

    @torch.no_grad()
    def _pool(
        self, documents: Sequence[Document], batch: Batch, totals: Totals
    ) -> list[np.ndarray]:
        """Each document's mean states (P, E) over its spans."""
        pooled_PE = pool(self.encode, batch).cpu().numpy()
        sizes = [len(document.student_spans_P2) for document in documents]
        return np.split(pooled_PE, np.cumsum(sizes)[:-1])


def pool(encode: Callable[[Tokens], torch.Tensor], batch: Batch) -> torch.Tensor:
    """The mean of the encoder's states over each span, fp32 (P, E): what the LLM reads between
    parts is left out."""
    states_UE = encode(batch.encoder).float()
    is_inside_PU = is_inside(batch.student_spans)
    if batch.parts is not None:
        is_inside_PU = is_inside_PU[:, batch.parts.places_U]
    return is_inside_PU.float() @ states_UE / is_inside_PU.sum(1, keepdim=True)


def fit_head(
    examples: Examples, held_out: Examples | None = None, *, num_outputs: int, per_choice: bool
) -> LinearHead:
    """Args: held_out: Chooses the penalty."""
    features_NPE = examples.features_NPE.double()
    flat_XE = features_NPE.flatten(0, 1)
    flat_XE = flat_XE[flat_XE.isfinite().all(1)]
    size = (1 if per_choice else num_outputs, flat_XE.shape[1])
    untrained = LinearHead(
        mean_E=flat_XE.mean(0),
        scale_E=flat_XE.std(0, correction=min(1, len(flat_XE) - 1)).clamp_min(1e-6),
        weight_FE=torch.zeros(size, dtype=torch.float64),
        bias_F=torch.zeros(size[0], dtype=torch.float64),
    )
    if held_out is None:
        return _fit(untrained, examples, PENALTY)
    heads = [_fit(untrained, examples, penalty) for penalty in PENALTIES]
    # Of those that are equally good the first.
    return max(heads, key=lambda head: _num_right(head, held_out))


def _fit(untrained: LinearHead, examples: Examples, penalty: float) -> LinearHead:
    """The one minimum of mean cross-entropy and penalised weights."""
    trained = [each.clone().requires_grad_() for each in (untrained.weight_FE, untrained.bias_F)]
    head = replace(untrained, weight_FE=trained[0], bias_F=trained[1])
    optimizer = torch.optim.LBFGS(trained, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = functional.cross_entropy(head(examples.features_NPE), examples.labels_N)
        total = error + penalty / 2 * head.weight_FE.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return replace(head, weight_FE=trained[0].detach(), bias_F=trained[1].detach())


def _num_right(head: LinearHead, examples: Examples) -> int:
    return int((head(examples.features_NPE).argmax(1) == examples.labels_N).sum())


def _stacked(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """fp32 (N, P, E), NaN where a document has fewer spans than others."""
    tensors = [torch.from_numpy(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=float("nan"))
