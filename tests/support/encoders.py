"""Tiny checkpoints of the encoders that run through transformers' own classes: random weights, in
the layouts that are published, with real tokenizers.

Each configuration asks for dropout of 0.9, and drops nine layers of ten where it can: whatever is
not in evaluation shows.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    MBart50Tokenizer,
    PreTrainedTokenizerBase,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from tests.support.tiny import build_encoder, texts

LONGEST = 30  # tokens, of the kinds that have a limit
WIDTH, LAYERS, HEADS, INNER = 16, 2, 4, 24
FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One family as it is published."""

    config: str  # by transformers' names of classes, as all here
    published: str
    """What its checkpoints hold."""
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    options: dict
    reader: str
    """What transformers reads the encoder with."""
    part: str = ""
    """The module of that which is the encoder."""
    reading: dict


def _pieces(specials: list[str]) -> list[tuple[str, float]]:
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token="<unk>")
    unigram.train_from_iterator(texts(200), trainer)
    pairs = json.loads(unigram.to_str())["model"]["vocab"]
    # Later digits, and with them the order, differ from training to training, and a random model's
    # embeddings would come to belong to other pieces.
    learned = [(piece, round(score, 2)) for piece, score in pairs if piece not in specials]
    ordered = sorted(learned, key=lambda pair: (-pair[1], pair[0]))
    return [*((special, 0.0) for special in specials), *ordered]


def _bert() -> BertTokenizer:
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=False)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces.train_from_iterator(
        texts(200), trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials)
    )
    # The trainer numbers them anew each time, see `_pieces`.
    learned = sorted(pieces.get_vocab().keys() - set(specials))
    numbers = {piece: number for number, piece in enumerate([*specials, *learned])}
    return BertTokenizer(vocab=numbers, do_lower_case=False)


def _xlm_roberta() -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer(vocab=[*_pieces(FAIRSEQ), ("<mask>", 0.0)])


def _mbart() -> MBart50Tokenizer:
    return MBart50Tokenizer(vocab=_pieces(FAIRSEQ), src_lang="en_XX")


def _t5() -> T5Tokenizer:
    return T5Tokenizer(vocab=_pieces(["<pad>", "</s>", "<unk>"]), extra_ids=0)


_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.9)
_BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": LONGEST,
    **_DROPOUT,
}
_ROBERTA = _BERT | {"max_position_embeddings": LONGEST + 2, "type_vocab_size": 1, "pad_token_id": 1}
_T5 = {
    "d_model": WIDTH,
    "d_kv": 6,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_decoder_layers": 1,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.9,
    "feed_forward_proj": "gated-gelu",
}
_MBART = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": LONGEST,
    "scale_embedding": True,
    "dropout": 0.9,
    "attention_dropout": 0.9,
    "activation_dropout": 0.9,
    "encoder_layerdrop": 0.9,
}


def _of_bert(name: str, published: str, tokenizer: Callable, options: dict) -> Kind:
    classes = {"config": f"{name}Config", "published": published, "reader": f"{name}Model"}
    no_pooler = {"add_pooling_layer": False}
    return Kind(**classes, tokenizer=tokenizer, options=options, reading=no_pooler)


def _of_t5(name: str, **options) -> Kind:
    classes = {"published": f"{name}ForConditionalGeneration", "reader": f"{name}EncoderModel"}
    rest = {"options": _T5 | options, "part": "encoder", "reading": {}}
    return Kind(config=f"{name}Config", **classes, tokenizer=_t5, **rest)


_of_roberta = partial(_of_bert, tokenizer=_xlm_roberta, options=_ROBERTA)
KINDS = {
    "labse": _of_bert("Bert", "BertModel", _bert, _BERT),
    "e5-small": _of_bert("Bert", "BertModel", _xlm_roberta, _BERT),
    "mbert": _of_bert("Bert", "BertForPreTraining", _bert, _BERT),
    "xlm-roberta": _of_roberta("XLMRoberta", "XLMRobertaForMaskedLM"),
    "e5-large": _of_roberta("XLMRoberta", "XLMRobertaModel"),
    "xlm-roberta-xl": _of_roberta("XLMRobertaXL", "XLMRobertaXLForMaskedLM"),
    "mbart-50": Kind(
        config="MBartConfig",
        published="MBartForConditionalGeneration",
        tokenizer=_mbart,
        options=_MBART,
        reader="MBartModel",
        part="encoder",
        reading={},
    ),
    "t5": _of_t5("T5", feed_forward_proj="relu"),
    "madlad-400": _of_t5("T5"),
    "mt5": _of_t5("MT5"),
    "umt5": _of_t5("UMT5"),
}


def build_padded_encoder(folder: Path, kind: str, *, vocab_size: int = 0, **options) -> Path:
    """A checkpoint with its tokenizer. Args: vocab_size: the folder has a tokenizer, of so many
    tokens."""
    row = KINDS[kind]
    if not vocab_size:
        tokenizer = row.tokenizer()
        tokenizer.save_pretrained(folder)
        vocab_size = len(tokenizer)
    config = getattr(transformers, row.config)(**row.options | options, vocab_size=vocab_size)
    torch.manual_seed(5)
    model = getattr(transformers, row.published)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                std = 1.0 if "embed" in name or "shared" in name else parameter.shape[1] ** -0.5
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    return folder


def build_under_nllb(folder: Path) -> Path:
    """An XLM-R for up to 64 tokens, whose tokenizer and so languages are NLLB's."""
    build_encoder(folder)
    sizes = {"vocab_size": len(AutoTokenizer.from_pretrained(folder))}
    return build_padded_encoder(folder, "e5-large", **sizes, max_position_embeddings=66)


def read_by_transformers(folder: Path, kind: str) -> nn.Module:
    """The encoder as transformers loads it, with the attention of its formula, in evaluation."""
    row = KINDS[kind]
    options = {"attn_implementation": "eager", "dtype": torch.float32, **row.reading}
    model = getattr(transformers, row.reader).from_pretrained(folder, **options).eval()
    return getattr(model, row.part) if row.part else model
