"""Tiny models that have really learned something: an M2M-100 in NLLB's shape and a Llama.

What is written, with their tokenizers, are ordinary Hugging Face checkpoints.
"""

import math
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mtllm_engine.languages import ENGLISH
from mtllm_engine.progress import Bar

MAX_TOKENS = 128
MAX_POSITIONS = 1024
CONTRAST_TEMPERATURE = 0.1
ALIGNMENT_TEMPERATURE = 0.1  # of the cosines by which a state finds its like in a translation
POOL = 20  # batches of translations, drawn together and sorted by length: little is padding
NEW_TOKENS = 40  # of a translation, at most

Progress = Callable[[range], Iterable[int]]
"""Passes the steps of a training on, and shows or counts them."""
SHOWN: Progress = partial(Bar, desc="training", unit="step")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Of the terms of the MT model's loss."""

    translation: float = 0.01
    """What the decoder says: so little that it errs, above all where there is little data."""
    words: float = 3.0  # what single states tell of the pivot's words
    contrast: float = 1.0  # between the means of lines' states
    distance: float = 1.0  # between them too
    token_distance: float = 2.0


def build_llm(
    folder: Path,
    texts: Sequence[str],
    *,
    steps: int,
    batch_tokens: int = 1024,
    vocab_size: int = 1000,
    width: int = 128,
    layers: int = 4,
    lr: float = 2e-3,
    seed: int = 0,
    progress: Progress = SHOWN,
) -> list[float]:
    """Trains a Llama to predict next tokens and saves it; returns each step's loss."""
    tokenizer = train_llama_tokenizer(texts, vocab_size)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=3 * width,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.5 * width**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    batches = token_batches(encode(tokenizer, texts), pad_id=0, batch_tokens=batch_tokens)
    losses = train(model, next_token_loss(model), batches, steps=steps, lr=lr, progress=progress)
    _save(folder, model, tokenizer)
    return losses


def build_mt(
    folder: Path,
    said: Mapping[str, Sequence[str]],
    *,
    steps: int,
    pairs: int = 24,
    copies: float = 0.25,
    pivot: float = 0.6,
    temperature: float = 20.0,
    weights: Weights = Weights(),
    vocab_size: int = 4000,
    width: int = 128,
    encoder_layers: int = 2,
    decoder_layers: int = 1,
    lr: float = 3e-3,
    seed: int = 0,
    progress: Progress = SHOWN,
) -> list[float]:
    """Trains an M2M-100 to translate and saves it; returns each step's loss.

    Args:
        said: What each language says, by its code; the first is the pivot. Line n means the same in
            all languages that have it.
        pairs: Pairs of a batch; each is learned in both directions.
        copies: The share of the pairs that are a line and itself: who reads any language must read
            the target's own.
        pivot: The share of the other pairs with the pivot on one side; the rest goes without it.
        temperature: A language is drawn by its number of lines to the power of 1 / temperature.
        weights: Of the terms of the loss. In so short a training translation alone does not make
            the languages share a space, which NLLB has from billions of sentences: the other terms
            do.
    """
    texts = [line for lines in said.values() for line in lines]
    tokenizer = train_nllb_tokenizer(texts, vocab_size, list(said))
    torch.manual_seed(seed)
    config = nllb_config(len(tokenizer), width, encoder_layers, decoder_layers)
    model = M2M100ForConditionalGeneration(config)
    lines = {language: _source_ids(tokenizer, language, texts) for language, texts in said.items()}
    batches = _pair_batches(lines, pairs, (copies, pivot, temperature), tokenizer.pad_token_id)
    english_id = tokenizer.convert_tokens_to_ids(next(iter(said)))
    losses = train(
        model,
        _mt_loss(model, weights, english_id),
        batches,
        steps=steps,
        lr=lr,
        warmup=100,
        progress=progress,
    )
    _save(folder, model, tokenizer)
    return losses


def nllb_config(
    vocab_size: int, width: int, encoder_layers: int, decoder_layers: int
) -> M2M100Config:
    """An M2M-100 in NLLB's shape, without dropout."""
    return M2M100Config(
        vocab_size=vocab_size,
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=MAX_POSITIONS,
        scale_embedding=True,
        # fairseq's own for embeddings; a smaller one drowns tokens in their positions.
        init_std=width**-0.5,
        dropout=0.0,
        attention_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    )


def train_nllb_tokenizer(
    texts: Iterable[str], vocab_size: int, languages: Sequence[str], source: str = ENGLISH
) -> NllbTokenizer:
    """NLLB's kind: SentencePiece BPE with its normaliser, then `<mask>` and languages' codes."""
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=f"{folder}/sentencepiece.bpe",  # the name that NLLB's repository gives it
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            num_threads=1,  # with more, ties fall differently from run to run
            minloglevel=2,
        )
        return NllbTokenizer.from_pretrained(
            folder, extra_special_tokens=list(languages), src_lang=source
        )


def train_llama_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Llama 3's kind: BPE on bytes, with a `<|begin_of_text|>` that it puts before every text."""
    start, end = "<|begin_of_text|>", "<|end_of_text|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[start, end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, bpe.token_to_id(start))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=start, eos_token=end)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids as the tokenizer itself makes them, special tokens included, at most MAX_TOKENS."""
    return tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]


def next_token_loss(model: LlamaForCausalLM) -> Callable[..., torch.Tensor]:
    """Cross-entropy of each real token given those before it."""

    def loss(ids_BL: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
        hidden_BLD = model.model(ids_BL, real_BL).last_hidden_state[:, :-1]
        real_BL = real_BL[:, 1:]
        return functional.cross_entropy(model.lm_head(hidden_BLD[real_BL]), ids_BL[:, 1:][real_BL])

    return loss


def train(
    model: nn.Module,
    loss: Callable[..., torch.Tensor],
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    lr: float,
    warmup: int = 40,
    progress: Progress = SHOWN,
) -> list[float]:
    """Trains in place, with a linear warm-up and decay; returns each step's loss.

    Args:
        warmup: In steps.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / steps)
    )
    losses = []
    for _ in progress(range(steps)):
        value = loss(*next(batches))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    return losses


def token_batches(
    documents: Sequence[Sequence[int]], pad_id: int, batch_tokens: int = 1024
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless epochs of padded ids_BL (int64) and what of them is real (bool), always the same.

    Documents of like length go together, so that little is padding.
    """
    generator = random.Random(0)
    while True:
        ordered = sorted(documents, key=lambda ids: len(ids) + generator.random() * 4)
        groups = list(_groups(ordered, batch_tokens))
        generator.shuffle(groups)
        for group in groups:
            yield _pad(group, pad_id)


@torch.no_grad()
def translate(
    model: M2M100ForConditionalGeneration,
    tokenizer: NllbTokenizer,
    texts: Sequence[str],
    source: str,
    target: str = ENGLISH,
    batch_size: int = 100,
) -> list[str]:
    """Greedy translations."""
    tokenizer.src_lang, translations = source, []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            list(texts[start : start + batch_size]), return_tensors="pt", padding=True
        )
        ids_BL = model.generate(
            **inputs,
            forced_bos_token_id=tokenizer.convert_tokens_to_ids(target),
            max_new_tokens=NEW_TOKENS,
            num_beams=1,
            do_sample=False,
        )
        translations += tokenizer.batch_decode(ids_BL, skip_special_tokens=True)
    return translations


@torch.no_grad()
def perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> float:
    """Of the texts' tokens; documents count by their batches, whose sizes are about alike."""
    loss, documents = next_token_loss(model), sorted(encode(tokenizer, texts), key=len)
    losses = [loss(*_pad(group, 0)).item() for group in _groups(documents, 4096)]
    return math.exp(sum(losses) / len(losses))


def _mt_loss(
    model: M2M100ForConditionalGeneration, weights: Weights, pivot_id: int
) -> Callable[..., torch.Tensor]:
    """Rows are sources in their own language; the halves are translations of one another."""
    pad_id, start_id = model.config.pad_token_id, model.config.decoder_start_token_id

    def loss(ids_BL: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
        memory_BLE = model.model.encoder(ids_BL, real_BL).last_hidden_state
        target_BL = ids_BL.roll(len(ids_BL) // 2, 0)
        before_BL = functional.pad(target_BL[:, :-1], (1, 0), value=start_id)
        hidden_BLE = model.model.decoder(before_BL, None, memory_BLE, real_BL).last_hidden_state
        asked_BL = target_BL != pad_id
        translation = functional.cross_entropy(
            model.lm_head(hidden_BLE[asked_BL]), target_BL[asked_BL]
        )
        is_pivot_B1 = (ids_BL[:, 0] == pivot_id).unsqueeze(1)
        pivot_BL = torch.where(is_pivot_B1, ids_BL, target_BL)
        has_B = pivot_BL[:, 0] == pivot_id
        words = word_loss(
            model.lm_head, memory_BLE[has_B], real_BL[has_B], pivot_BL[has_B, 1:], pad_id
        )
        contrast, distance = pooled_terms(memory_BLE, real_BL)
        return (
            weights.translation * translation
            + weights.words * words
            + weights.contrast * contrast
            + weights.distance * distance
            + weights.token_distance * token_distance(memory_BLE, real_BL)
        )

    return loss


def word_loss(
    head: nn.Module,
    memory_BLE: torch.Tensor,
    real_BL: torch.Tensor,
    words_BW: torch.Tensor,
    pad_id: int,
) -> torch.Tensor:
    """Minus the mean log-likelihood of the pivot's words, each from any one state (IBM Model 1)."""
    logits_BLV = head(memory_BLE)
    index_BLW = words_BW.unsqueeze(1).expand(-1, logits_BLV.shape[1], -1)
    scores_BLW = logits_BLV.gather(2, index_BLW) - logits_BLV.logsumexp(-1, keepdim=True)
    scores_BW = scores_BLW.masked_fill(~real_BL.unsqueeze(-1), -math.inf).logsumexp(1)
    return (real_BL.sum(1, keepdim=True).log() - scores_BW)[words_BW != pad_id].mean()


def pooled_terms(
    memory_BLE: torch.Tensor, real_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How hard it is to find a line's translation in the batch, and how far from it the line is.

    By the means of lines' states: the first as LaBSE trains sentence encoders, the second as a
    fraction of the variance. The distance alone would be least where little but a line's most
    common traits is told.
    """
    real_BL1 = real_BL.unsqueeze(-1)
    pooled_BE = (memory_BLE * real_BL1).sum(1) / real_BL1.sum(1)
    pooled_BE = pooled_BE - pooled_BE.mean(0)
    ours_BE, theirs_BE = pooled_BE.chunk(2)
    distance = (ours_BE - theirs_BE).square().sum() / pooled_BE.square().sum()
    ours_BE = functional.normalize(ours_BE, dim=-1)
    theirs_BE = functional.normalize(theirs_BE, dim=-1)
    similarity_BB = ours_BE @ theirs_BE.T / CONTRAST_TEMPERATURE
    right_B = torch.arange(len(similarity_BB))
    forth = functional.cross_entropy(similarity_BB, right_B)
    back = functional.cross_entropy(similarity_BB.T, right_B)
    return (forth + back) / 2, distance


def token_distance(memory_BLE: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
    """How far a state is from its like in the translation, as a fraction of the variance.

    Its like is what it attends to there, by cosine.
    """
    other_BLE, other_real_BL = (
        states.roll(len(states) // 2, 0) for states in (memory_BLE, real_BL)
    )
    ours_BLE = functional.normalize(memory_BLE, dim=-1)
    theirs_BLE = functional.normalize(other_BLE, dim=-1)
    cosine_BLL = ours_BLE @ theirs_BLE.transpose(1, 2)
    scores_BLL = (cosine_BLL / ALIGNMENT_TEMPERATURE).masked_fill(
        ~other_real_BL.unsqueeze(1), -math.inf
    )
    like_BLE = scores_BLL.softmax(-1) @ other_BLE
    error = (memory_BLE - like_BLE)[real_BL].square().sum(-1).mean()
    return error / memory_BLE[real_BL].var(0).sum()


def _source_ids(tokenizer: NllbTokenizer, language: str, texts: Sequence[str]) -> list[list[int]]:
    tokenizer.src_lang = language
    return encode(tokenizer, texts)


def _pair_batches(
    lines: Mapping[str, Sequence[Sequence[int]]],
    pairs: int,
    mixture: tuple[float, float, float],
    pad_id: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless ids_BL and real_BL: `pairs` rows, then their translations in the same order."""
    generator = random.Random(0)
    while True:
        drawn = [_draw_pair(generator, lines, *mixture) for _ in range(POOL * pairs)]
        drawn.sort(key=lambda pair: len(pair[0]) + len(pair[1]) + generator.random())
        groups = [drawn[start : start + pairs] for start in range(0, len(drawn), pairs)]
        generator.shuffle(groups)
        for group in groups:
            yield _pad([ids for side in zip(*group) for ids in side], pad_id)


def _draw_pair(
    generator: random.Random,
    lines: Mapping[str, Sequence[Sequence[int]]],
    copies: float,
    pivot: float,
    temperature: float,
) -> tuple[Sequence[int], Sequence[int]]:
    first, *others = lines
    weights = [len(lines[other]) ** (1 / temperature) for other in others]
    (language,) = generator.choices(others, weights)
    number = generator.randrange(len(lines[language]))
    if generator.random() < copies:
        language = partner = generator.choice((first, language))
    elif generator.random() < pivot:
        partner = first
    else:
        partners = [other for other in others if other != language and len(lines[other]) > number]
        partner = generator.choice(partners or [first])
    return lines[language][number], lines[partner][number]


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_BL (int64) and what of them is real (bool)."""
    ids = [torch.tensor(row) for row in rows]
    real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    ids_BL = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)
    return ids_BL, nn.utils.rnn.pad_sequence(real, batch_first=True)


def _groups(
    ordered: Sequence[Sequence[int]], batch_tokens: int
) -> Iterator[Sequence[Sequence[int]]]:
    """Neighbours, together at most `batch_tokens` once padded; documents come by rising length."""
    group: list[Sequence[int]] = []
    for ids in ordered:
        if group and (len(group) + 1) * len(ids) > batch_tokens:
            yield group
            group = []
        group.append(ids)
    yield group


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
