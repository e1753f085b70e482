"""Belebele: which of four answers to a question about a passage is right.

The text is `passage question`, then the choices on lines of their own: `1 first`, `2 second`, ... A
choice's span is its line, number and all: an answer may be empty, or nothing but characters that a
tokenizer drops, and what is pooled is then its number. `belebele_training` is the English set that
the benchmark's authors assembled to train on. Read are `data/{code}.jsonl`, as in the hub's
repository and (in `Belebele/`) the authors' archive, and the Parquet that the hub makes of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mtllm_engine.data.rows import Row, find, hub, quoted, read
from mtllm_engine.languages import ENGLISH, flores_code
from mtllm_engine.tasks import SEPARATOR, Dataset, Example, Task

NUM_CHOICES = 4
DEV = {"validation": "dev"}
CODES = """
    acm_Arab afr_Latn als_Latn amh_Ethi apc_Arab arb_Arab arb_Latn ars_Arab ary_Arab ary_arab
    arz_Arab asm_Beng azj_Latn bam_Latn ben_Beng ben_Latn bod_Tibt bul_Cyrl cat_Latn ceb_Latn
    ces_Latn ckb_Arab dan_Latn deu_Latn ell_Grek eng_Latn est_Latn eus_Latn fin_Latn fra_Latn
    fuv_Latn gaz_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hin_Latn hrv_Latn
    hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kac_Latn
    kan_Knda kat_Geor kaz_Cyrl kea_Latn khk_Cyrl khm_Khmr kin_Latn kir_Cyrl kor_Hang lao_Laoo
    lin_Latn lit_Latn lug_Latn luo_Latn lvs_Latn mal_Mlym mar_Deva mkd_Cyrl mlt_Latn mri_Latn
    mya_Mymr nld_Latn nob_Latn npi_Deva npi_Latn nso_Latn nya_Latn ory_Orya pan_Guru pbt_Arab
    pes_Arab plt_Latn pol_Latn por_Latn ron_Latn rus_Cyrl shn_Mymr sin_Latn sin_Sinh slk_Latn
    slv_Latn sna_Latn snd_Arab som_Latn sot_Latn spa_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn
    swh_Latn tam_Taml tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi tsn_Latn tso_Latn tur_Latn
    ukr_Cyrl urd_Arab urd_Latn uzn_Latn vie_Latn war_Latn wol_Latn xho_Latn yor_Latn zho_Hans
    zho_Hant zsm_Latn zul_Latn
"""  # the set's README writes ary_arab


def compose(key: str, passage: str, question: str, choices: Sequence[str], label: int) -> Example:
    """One text of passage, question and choices; what is too long is shortened in the passage."""
    text, spans = f"{passage} {question}", []
    for number, choice in enumerate(choices, start=1):
        text += SEPARATOR
        line = f"{number} {choice}"
        spans.append((len(text), len(text) + len(line)))
        text += line
    return Example(key=key, text=text, label=label, spans=tuple(spans), cut=(0, len(passage)))


def _questions(rows: Iterable[Row], passage: str, answer: str) -> Iterator[Example]:
    """Examples of rows with these columns, `answer` without its number."""
    for number, row in enumerate(rows):
        choices = [row.text_or_empty(f"{answer}{choice}") for choice in range(1, NUM_CHOICES + 1)]
        label = row.number("correct_answer_num", 1, NUM_CHOICES) - 1
        yield compose(str(number), row.text(passage), row.text("question"), choices, label)


def _read(folder: Path, split: str, code: str) -> Iterator[Example]:
    """One split; the questions are in one order in every language, so their number is their key."""
    name = f"{code}.jsonl"
    layouts = (f"data/{name}", f"Belebele/{name}", name, *hub(code, split))
    paths = find(folder, *layouts) if split == "test" else ()
    return _questions((row for path in paths for row in read(path)), "flores_passage", "mc_answer")


def _read_training(folder: Path, split: str, code: str) -> Iterator[Example]:
    """What assemble_training_set.py writes: both splits in a table, quoted, newlines in fields."""
    paths = find(folder, "belebele_training_set.tsv") if code == ENGLISH else ()
    rows = (row for path in paths for row in quoted(path, "\t"))
    of_split = (row for row in rows if row.value("split") == DEV.get(split, split))
    return _questions(of_split, "passage", "answer")


DATASETS = (
    Dataset(
        name="belebele",
        languages={code: flores_code(code) for code in CODES.split()},
        reader=_read,
        licence="CC-BY-SA-4.0",
    ),
    Dataset(
        name="belebele_training",
        languages={ENGLISH: ENGLISH},
        reader=_read_training,
        licence="of RACE, SciQ, MultiRC, MCTest, MCScript2.0 and ReClor",
    ),
)
task = Task(
    name="belebele",
    head="choice",
    metric="accuracy",
    num_choices=NUM_CHOICES,
    datasets={dataset.name: dataset for dataset in DATASETS},
    train=("belebele_training", "train"),
    validation=("belebele_training", "validation"),
)
