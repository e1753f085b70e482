"""A model's own tokenizer: loaded, or refused, and what it does by itself."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
import transformers
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mtllm_engine.data.encoder_languages import EncoderLanguages, find_languages
from mtllm_engine.data.pieces import SentencePieces, backend_of, has_pieces, only_read
from mtllm_engine.files import check_pulled


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer, from its folder or the hub; none of its code is run. It has a Rust
    backend, or is M2M-100's.

    A text is a text: a control token that is spelled in it is its characters.

    Raises:
        ValueError: There is none, it needs code of its own, or it does not say which characters a
            token has.
    """
    _check_pulled(Path(folder))
    try:
        # "Split": control tokens in a text are not looked for.
        options = {"trust_remote_code": False, "split_special_tokens": True}
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:  # tokenizers raises bare ones, transformers of many types
        reason = _reason(Path(folder), error)
        raise ValueError(f"cannot load a tokenizer from {folder}: {reason}") from error
    added = {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}
    if set(tokenizer.get_vocab()) <= added:
        raise ValueError(f"the tokenizer in {folder} has no words: is its tokenizer.json missing?")
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        only_read(tokenizer)
    elif type(tokenizer).__name__ != "M2M100Tokenizer":
        has = f"the tokenizer in {folder} ({type(tokenizer).__name__}) has no tokenizer.json"
        reason = "and so does not say which characters a token has, by which texts are cut"
        raise ValueError(f"{has}, {reason}; use an encoder with a fast (tokenizers) version")
    return tokenizer


def read_languages(encoder: str | Path) -> EncoderLanguages:
    """The languages of the encoder in a folder or on the hub.

    Raises:
        ValueError: It has no tokenizer.
    """
    return languages_of(load_tokenizer(encoder), encoder)


def languages_of(tokenizer: PreTrainedTokenizerBase, encoder: str | Path) -> EncoderLanguages:
    """The languages of an encoder, by its tokenizer and its config.json."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(encoder))
    except OSError:  # a tokenizer alone
        config = {}
    added = {*tokenizer.get_added_vocab(), *getattr(tokenizer, "lang_token_to_id", ())}
    model_type = config.get("model_type", "")
    return find_languages(added, model_type=model_type, has_pieces=has_pieces(tokenizer))


def largest_id(tokenizer: PreTrainedTokenizerBase, around: Iterable[int]) -> int:
    """The largest id that can come out of a text with some around it: what else was added to the
    vocabulary, such as a token for padding, does not, spelled in a text or not.
    """
    backend = backend_of(tokenizer)
    if isinstance(backend, SentencePieces):
        return max(*backend.ids.values(), *around)
    words = backend.get_vocab(with_added_tokens=False).values()
    added = backend.get_added_tokens_decoder()
    plain = (token_id for token_id, token in added.items() if not token.special)
    return max(itertools.chain(words, plain, around))


def _check_pulled(folder: Path) -> None:
    """Raises: ValueError: git-lfs's pointer lies in the place of a file that would be read."""
    is_whole = (folder / "tokenizer.json").is_file()  # which all is in
    for pattern in ("tokenizer*.json", *([] if is_whole else ["*.model"])):
        for path in folder.glob(pattern):
            check_pulled(path)


def _reason(folder: Path, error: Exception) -> str:
    """Why a tokenizer does not load."""
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return "it needs its own code, which is never run"
    needed = ["tokenizer_config.json"]
    needed += [] if any(folder.glob("*.model")) else ["tokenizer.json"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if folder.is_dir() and missing:
        return f"it has no {' and no '.join(missing)}; copy that from the model"
    if isinstance(error, ImportError):
        package = "sentencepiece" if "sentencepiece" in said.lower() else said
        return f"it needs a package that is not here: pip install {package}"
    if isinstance(error, OSError | ValueError):
        return said
    about = folder / "tokenizer_config.json"
    saved = json.loads(about.read_bytes()) if about.is_file() else {}
    if empty := [key for key in ("eos_token", "unk_token") if saved.get(key, "") is None]:
        return f"its tokenizer_config.json has no {' and no '.join(empty)}; give it the model's"
    version = f"tokenizers {tokenizers.__version__} and transformers {transformers.__version__}"
    return f"its files are damaged, or not of this version ({version}): {said}"
