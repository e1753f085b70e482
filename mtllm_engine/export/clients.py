"""What a card's program must know of an encoder: its class, and how it is told the language."""

from dataclasses import dataclass
from pathlib import Path

from transformers import M2M100Config, PreTrainedConfig

from mtllm_engine.config import Config
from mtllm_engine.data.encoder_languages import EncoderLanguages
from mtllm_engine.data.pieces import has_pieces
from mtllm_engine.data.vocabulary import languages_of, load_tokenizer
from mtllm_engine.model.build import read_encoder
from mtllm_engine.model.padded import FAMILIES
from mtllm_engine.model.tensors import resolve

SWAHILI = "swh_Latn"
SPELLED = """
A control token that a text spells, such as `</s>`, is read as such here; in training it was its
characters.
"""


@dataclass(frozen=True, kw_only=True)
class Client:
    """An encoder in programs of transformers' own."""

    config: PreTrainedConfig
    languages: EncoderLanguages
    spells: bool
    """Whether its tokenizer takes control tokens that a text spells for its own."""
    prefix: str
    """`model.encoder_prefix`."""

    @classmethod
    def of(cls, config: Config) -> "Client":
        folder = resolve(config.model.encoder)
        tokenizer = load_tokenizer(folder)
        return cls(
            config=read_encoder(folder),
            languages=languages_of(tokenizer, folder),
            spells=has_pieces(tokenizer),
            prefix=config.model.encoder_prefix,
        )

    @property
    def words(self) -> dict[str, str]:
        """Pieces of Python and of English, by what a template calls them."""
        module = self.config.model_type.replace("-", "_")
        whole, part, options = _published(self.config)
        is_told, prefix = self.languages.is_told, repr(self.prefix)
        return {
            "published": whole,
            "part": f".{part}" if part else "",
            "options": options,
            "module": f"transformers.models.{module}.modeling_{module}",
            "alone": class_alone(self.config),
            "language": ", language" if is_told else "",
            "example": f", {self._their_code!r}" if is_told else "",
            "tell": self._tell() if is_told else "",
            "text": f"{prefix} + text" if self.prefix else "text",
            "texts": f"[{prefix} + text for text in texts]" if self.prefix else "texts",
            "spelled": SPELLED if self.spells else "",
        }

    def _tell(self) -> str:
        """Lines in a function's body."""
        of_nllb = " (sat_Olck is sat_Beng there)" * ("sat_Olck" in self.languages.tokens)
        names = f"its own name of the language, such as {self._their_code}{of_nllb}"
        known = "tokenizer.convert_tokens_to_ids(language) != tokenizer.unk_token_id"
        if self._is_m2m100:
            known = "language in tokenizer.lang_code_to_id"
        lines = (
            f"# The encoder is told {names}.",
            f"assert {known}, language",
            "tokenizer.src_lang = language",
        )
        return "".join(f"    {line}\n" for line in lines)

    @property
    def _their_code(self) -> str:
        """What the tokenizer calls Swahili, or else the first language that it knows."""
        tokens = self.languages.tokens
        token = tokens.get(SWAHILI) or tokens[min(tokens)]
        return token.strip("_") if self._is_m2m100 else token

    @property
    def _is_m2m100(self) -> bool:
        """Whether languages are named as M2M-100 does, `sw` and its token `__sw__`."""
        return any(token.startswith("__") for token in self.languages.tokens.values())


def class_of(folder: Path) -> str:
    """transformers' class that has the encoder in a folder and nothing else."""
    return class_alone(read_encoder(folder))


def class_alone(config: PreTrainedConfig) -> str:
    if isinstance(config, M2M100Config):
        return "M2M100Encoder"
    return FAMILIES[config.model_type].class_alone


def _published(config: PreTrainedConfig) -> tuple[str, str, str]:
    """The class that opens a checkpoint as it is published, which part of it is the encoder, and
    options of the call in Python."""
    if isinstance(config, M2M100Config):
        return "M2M100Model", "encoder", ""
    family = FAMILIES[config.model_type]
    options = "".join(f"{key}={value!r}, " for key, value in family.options.items())
    return family.model, family.part, options
