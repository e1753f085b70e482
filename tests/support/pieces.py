"""Tokenizers of every family of encoders, of transformers' own classes, with pieces trained on
sentences in 26 scripts and the normalisation that is published: SentencePiece's.
"""

import itertools
import json
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as messages
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    PreTrainedTokenizerBase,
    T5Tokenizer,
    XLMRobertaTokenizer,
)
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES as MBART_25

from tests.support.scripts import SENTENCES
from tests.support.tiny import texts

FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>"]
MODEL_TYPES = {
    "e5-small": "bert",
    "labse": "bert",
    "xlm-roberta": "xlm-roberta",
    "t5": "t5",
    "mt5": "mt5",
    "mbart-50": "mbart",
    "mbart-25": "mbart",
    "m2m-100": "m2m_100",
    "m2m-100 of unigrams": "m2m_100",
}
KINDS = tuple(MODEL_TYPES)


def build_tokenizers(folder: Path) -> dict[str, Path]:
    """A folder each, with the config.json that says the family."""
    samples = [*itertools.chain(*SENTENCES.values()), *texts(100)]
    spm = {kind: train_pieces(folder / kind, samples, kind) for kind in ("unigram", "bpe")}
    proto = messages.ModelProto.FromString(spm["unigram"].read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces[3:]]
    normal = {"_spm_precompiled_charsmap": proto.normalizer_spec.precompiled_charsmap}
    fairseq = [*((token, 0.0) for token in FAIRSEQ), *pieces]
    t5 = [*((token, 0.0) for token in ("<pad>", "</s>", "<unk>")), *pieces]
    xlm_roberta = XLMRobertaTokenizer(vocab=[*fairseq, ("<mask>", 0.0)], **normal)
    mbart_25 = [*fairseq, *((code, 0.0) for code in MBART_25), ("<mask>", 0.0)]
    made: dict[str, PreTrainedTokenizerBase] = {
        "e5-small": xlm_roberta,
        "labse": _wordpieces(samples),
        "xlm-roberta": xlm_roberta,
        "t5": T5Tokenizer(vocab=t5, extra_ids=0, **normal),
        "mt5": T5Tokenizer(vocab=t5, extra_ids=0, **normal),
        "mbart-50": MBart50Tokenizer(vocab=[*proto_pieces(proto)], src_lang="en_XX", **normal),
        "mbart-25": MBartTokenizer(vocab=mbart_25, src_lang="en_XX"),
        "m2m-100": build_m2m_100(folder, spm["bpe"]),
        "m2m-100 of unigrams": build_m2m_100(folder, spm["unigram"]),
    }
    folders = {}
    for kind, tokenizer in made.items():
        folders[kind] = folder / kind.replace(" ", "-")
        tokenizer.save_pretrained(folders[kind])
        config = {"model_type": MODEL_TYPES[kind]}
        (folders[kind] / "config.json").write_text(json.dumps(config))
    return folders


def train_pieces(prefix: Path, samples: list[str], kind: str, *, size: int = 1100) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(samples),
        model_prefix=str(prefix),
        model_type=kind,
        vocab_size=size,
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
    )
    return prefix.with_suffix(".model")


def proto_pieces(proto) -> list[tuple[str, float]]:
    """In SentencePiece's own order, which begins with what is no piece."""
    return [(piece.piece, piece.score) for piece in proto.pieces]


def build_m2m_100(folder: Path, model: Path, *, lacks: str = "") -> M2M100Tokenizer:
    """Args: lacks: A piece that the model's vocabulary does not have."""
    proto = messages.ModelProto.FromString(model.read_bytes())
    pieces = sorted(piece.piece for piece in proto.pieces[3:] if piece.piece != lacks)
    vocabulary = folder / f"{model.stem}.json"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate([*FAIRSEQ, *pieces])}))
    return M2M100Tokenizer(vocab_file=str(vocabulary), spm_file=str(model))


def _wordpieces(samples: list[str]) -> BertTokenizer:
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=False)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1100, special_tokens=specials)
    pieces.train_from_iterator(samples, trainer)
    return BertTokenizer(vocab=pieces.get_vocab(), do_lower_case=False)
