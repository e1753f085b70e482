"""Languages: FLORES-200's codes and names, benchmarks' codes for them, and NLLB's tokens.

A language is a code of the form `swh_Latn`: ISO 639-3, script by ISO 15924. Where FLORES-200 lacks
a language, it keeps a code of that form (`nij_Latn`) and is unknown to NLLB's encoders, but not to
one whose tokenizer was given that token; those that benchmarks or encoders have are named here too.
qaa to qtz, ISO 639-3's private range, are there for encoders of one's own.
"""

import re
from collections.abc import Collection
from difflib import SequenceMatcher
from os.path import commonprefix

ENGLISH = "eng_Latn"
"""What tasks are learned in, and what the teacher reads."""

_NAMES = """
    ace_Arab Acehnese; ace_Latn Acehnese; acm_Arab Mesopotamian Arabic;
    acq_Arab Ta'izzi-Adeni Arabic; aeb_Arab Tunisian Arabic; afr_Latn Afrikaans;
    ajp_Arab South Levantine Arabic; aka_Latn Akan; als_Latn Tosk Albanian; amh_Ethi Amharic;
    apc_Arab North Levantine Arabic; arb_Arab Modern Standard Arabic;
    arb_Latn Modern Standard Arabic; ars_Arab Najdi Arabic; ary_Arab Moroccan Arabic;
    arz_Arab Egyptian Arabic; asm_Beng Assamese; ast_Latn Asturian; awa_Deva Awadhi;
    ayr_Latn Central Aymara; azb_Arab South Azerbaijani; azj_Latn North Azerbaijani;
    bak_Cyrl Bashkir; bam_Latn Bambara; ban_Latn Balinese; bel_Cyrl Belarusian; bem_Latn Bemba;
    ben_Beng Bengali; bho_Deva Bhojpuri; bjn_Arab Banjar; bjn_Latn Banjar;
    bod_Tibt Standard Tibetan; bos_Latn Bosnian; bug_Latn Buginese; bul_Cyrl Bulgarian;
    cat_Latn Catalan; ceb_Latn Cebuano; ces_Latn Czech; cjk_Latn Chokwe; ckb_Arab Central Kurdish;
    crh_Latn Crimean Tatar; cym_Latn Welsh; dan_Latn Danish; deu_Latn German;
    dik_Latn Southwestern Dinka; dyu_Latn Dyula; dzo_Tibt Dzongkha; ell_Grek Greek;
    eng_Latn English; epo_Latn Esperanto; est_Latn Estonian; eus_Latn Basque; ewe_Latn Ewe;
    fao_Latn Faroese; fij_Latn Fijian; fin_Latn Finnish; fon_Latn Fon; fra_Latn French;
    fur_Latn Friulian; fuv_Latn Nigerian Fulfulde; gaz_Latn West Central Oromo;
    gla_Latn Scottish Gaelic; gle_Latn Irish; glg_Latn Galician; grn_Latn Guarani;
    guj_Gujr Gujarati; hat_Latn Haitian Creole; hau_Latn Hausa; heb_Hebr Hebrew; hin_Deva Hindi;
    hne_Deva Chhattisgarhi; hrv_Latn Croatian; hun_Latn Hungarian; hye_Armn Armenian; ibo_Latn Igbo;
    ilo_Latn Ilocano; ind_Latn Indonesian; isl_Latn Icelandic; ita_Latn Italian; jav_Latn Javanese;
    jpn_Jpan Japanese; kab_Latn Kabyle; kac_Latn Jingpho; kam_Latn Kamba; kan_Knda Kannada;
    kas_Arab Kashmiri; kas_Deva Kashmiri; kat_Geor Georgian; kaz_Cyrl Kazakh; kbp_Latn Kabiyè;
    kea_Latn Kabuverdianu; khk_Cyrl Halh Mongolian; khm_Khmr Khmer; kik_Latn Kikuyu;
    kin_Latn Kinyarwanda; kir_Cyrl Kyrgyz; kmb_Latn Kimbundu; kmr_Latn Northern Kurdish;
    knc_Arab Central Kanuri; knc_Latn Central Kanuri; kon_Latn Kikongo; kor_Hang Korean;
    lao_Laoo Lao; lij_Latn Ligurian; lim_Latn Limburgish; lin_Latn Lingala; lit_Latn Lithuanian;
    lmo_Latn Lombard; ltg_Latn Latgalian; ltz_Latn Luxembourgish; lua_Latn Luba-Kasai;
    lug_Latn Ganda; luo_Latn Luo; lus_Latn Mizo; lvs_Latn Standard Latvian; mag_Deva Magahi;
    mai_Deva Maithili; mal_Mlym Malayalam; mar_Deva Marathi; min_Arab Minangkabau;
    min_Latn Minangkabau; mkd_Cyrl Macedonian; mlt_Latn Maltese; mni_Beng Meitei; mos_Latn Mossi;
    mri_Latn Maori; mya_Mymr Burmese; nld_Latn Dutch; nno_Latn Norwegian Nynorsk;
    nob_Latn Norwegian Bokmål; npi_Deva Nepali; nso_Latn Northern Sotho; nus_Latn Nuer;
    nya_Latn Nyanja; oci_Latn Occitan; ory_Orya Odia; pag_Latn Pangasinan; pan_Guru Eastern Panjabi;
    pap_Latn Papiamento; pbt_Arab Southern Pashto; pes_Arab Western Persian;
    plt_Latn Plateau Malagasy; pol_Latn Polish; por_Latn Portuguese; prs_Arab Dari;
    quy_Latn Ayacucho Quechua; ron_Latn Romanian; run_Latn Rundi; rus_Cyrl Russian; sag_Latn Sango;
    san_Deva Sanskrit; sat_Olck Santali; scn_Latn Sicilian; shn_Mymr Shan; sin_Sinh Sinhala;
    slk_Latn Slovak; slv_Latn Slovenian; smo_Latn Samoan; sna_Latn Shona; snd_Arab Sindhi;
    som_Latn Somali; sot_Latn Southern Sotho; spa_Latn Spanish; srd_Latn Sardinian;
    srp_Cyrl Serbian; ssw_Latn Swati; sun_Latn Sundanese; swe_Latn Swedish; swh_Latn Swahili;
    szl_Latn Silesian; tam_Taml Tamil; taq_Latn Tamasheq; taq_Tfng Tamasheq; tat_Cyrl Tatar;
    tel_Telu Telugu; tgk_Cyrl Tajik; tgl_Latn Tagalog; tha_Thai Thai; tir_Ethi Tigrinya;
    tpi_Latn Tok Pisin; tsn_Latn Tswana; tso_Latn Tsonga; tuk_Latn Turkmen; tum_Latn Tumbuka;
    tur_Latn Turkish; twi_Latn Twi; tzm_Tfng Central Atlas Tamazight; uig_Arab Uyghur;
    ukr_Cyrl Ukrainian; umb_Latn Umbundu; urd_Arab Urdu; uzn_Latn Northern Uzbek; vec_Latn Venetian;
    vie_Latn Vietnamese; war_Latn Waray; wol_Latn Wolof; xho_Latn Xhosa; ydd_Hebr Eastern Yiddish;
    yor_Latn Yoruba; yue_Hant Yue Chinese; zho_Hans Chinese; zho_Hant Chinese;
    zsm_Latn Standard Malay; zul_Latn Zulu
"""
# What test sets, and then what encoders have beside those.
_MORE_NAMES = """
    bbc_Latn Toba Batak; ben_Latn Bengali; bzd_Latn Bribri; cni_Latn Asháninka; hch_Latn Wixarika;
    hin_Latn Hindi; mad_Latn Madurese; nah_Latn Nahuatl; nij_Latn Ngaju; npi_Latn Nepali;
    nqo_Nkoo N'Ko; oto_Latn Otomí; shp_Latn Shipibo-Konibo; sin_Latn Sinhala; tar_Latn Rarámuri;
    uig_Cyrl Uyghur; urd_Latn Urdu;
    bre_Latn Breton; bul_Latn Bulgarian; cos_Latn Corsican; ell_Latn Greek;
    fry_Latn Western Frisian; haw_Latn Hawaiian; hmn_Latn Hmong; jpn_Latn Japanese; lat_Latn Latin;
    rus_Latn Russian; tam_Latn Tamil; tel_Latn Telugu; zho_Latn Chinese
"""


def _table(entries: str) -> dict[str, str]:
    return dict(entry.strip().split(" ", 1) for entry in entries.split(";"))


FLORES_200 = tuple(_table(_NAMES))
NAMES = _table(_NAMES) | _table(_MORE_NAMES)
"""Code -> English name: FLORES-200's first, then those of languages that it lacks."""
_SCRIPTS = """
    Arab Arabic; Armn Armenian; Beng Bengali; Cyrl Cyrillic; Deva Devanagari; Ethi Ethiopic;
    Geor Georgian; Grek Greek; Gujr Gujarati; Guru Gurmukhi; Hang Hangul; Hans Simplified Han;
    Hant Traditional Han; Hebr Hebrew; Jpan Japanese; Khmr Khmer; Knda Kannada; Laoo Lao;
    Latn Latin; Mlym Malayalam; Mymr Myanmar; Nkoo NKo; Olck Ol Chiki; Orya Oriya; Sinh Sinhala;
    Taml Tamil; Telu Telugu; Tfng Tifinagh; Thai Thai; Tibt Tibetan
"""
SCRIPTS = _table(_SCRIPTS)
"""ISO 15924 -> English name."""

# Two letters: ISO 639-1. Three: ISO 639-3's and 639-2's codes for a group of languages, of which
# FLORES has one.
_OTHER_CODES = """
    af afr_Latn am amh_Ethi ar arb_Arab as asm_Beng ay ayr_Latn az azj_Latn ba bak_Cyrl be bel_Cyrl
    bg bul_Cyrl bm bam_Latn bn ben_Beng bo bod_Tibt bs bos_Latn ca cat_Latn cs ces_Latn cy cym_Latn
    da dan_Latn de deu_Latn dz dzo_Tibt ee ewe_Latn el ell_Grek en eng_Latn eo epo_Latn es spa_Latn
    et est_Latn eu eus_Latn fa pes_Arab fi fin_Latn fj fij_Latn fo fao_Latn fr fra_Latn ga gle_Latn
    gd gla_Latn gl glg_Latn gn grn_Latn gu guj_Gujr ha hau_Latn he heb_Hebr hi hin_Deva hr hrv_Latn
    ht hat_Latn hu hun_Latn hy hye_Armn id ind_Latn ig ibo_Latn is isl_Latn it ita_Latn ja jpn_Jpan
    jv jav_Latn ka kat_Geor ki kik_Latn kk kaz_Cyrl km khm_Khmr kn kan_Knda ko kor_Hang ky kir_Cyrl
    lb ltz_Latn lg lug_Latn li lim_Latn ln lin_Latn lo lao_Laoo lt lit_Latn lv lvs_Latn mg plt_Latn
    mi mri_Latn mk mkd_Cyrl ml mal_Mlym mn khk_Cyrl mr mar_Deva ms zsm_Latn mt mlt_Latn my mya_Mymr
    nb nob_Latn ne npi_Deva nl nld_Latn nn nno_Latn no nob_Latn ny nya_Latn oc oci_Latn om gaz_Latn
    or ory_Orya pa pan_Guru pl pol_Latn ps pbt_Arab pt por_Latn qu quy_Latn rn run_Latn ro ron_Latn
    ru rus_Cyrl rw kin_Latn sa san_Deva sc srd_Latn sd snd_Arab sg sag_Latn si sin_Sinh sk slk_Latn
    sl slv_Latn sm smo_Latn sn sna_Latn so som_Latn sq als_Latn sr srp_Cyrl ss ssw_Latn st sot_Latn
    su sun_Latn sv swe_Latn sw swh_Latn ta tam_Taml te tel_Telu tg tgk_Cyrl th tha_Thai ti tir_Ethi
    tk tuk_Latn tl tgl_Latn tn tsn_Latn tr tur_Latn ts tso_Latn tt tat_Cyrl tw twi_Latn ug uig_Arab
    uk ukr_Cyrl ur urd_Arab uz uzn_Latn vi vie_Latn wo wol_Latn xh xho_Latn yi ydd_Hebr yo yor_Latn
    zh zho_Hans zu zul_Latn ara arb_Arab aym ayr_Latn aze azj_Latn fas pes_Arab ful fuv_Latn
    kur kmr_Latn lav lvs_Latn mlg plt_Latn mon khk_Cyrl msa zsm_Latn nep npi_Deva nor nob_Latn
    ori ory_Orya orm gaz_Latn pus pbt_Arab que quy_Latn sqi als_Latn swa swh_Latn uzb uzn_Latn
    yid ydd_Hebr
"""
OTHER_CODES = dict(zip(_OTHER_CODES.split()[::2], _OTHER_CODES.split()[1::2], strict=True))
_FORM = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_PRIVATE = re.compile(r"q[a-t][a-z]_[A-Z][a-z]{3}")


def is_well_formed(code: str) -> bool:
    """Whether a code has the form of FLORES-200's, known there or not."""
    return bool(_FORM.fullmatch(code))


def flores_code(code: str) -> str:
    """A benchmark's code (one of `NAMES` in any case, ISO 639-1, ISO 639-3) as ours.

    An ISO code is taken for the only FLORES-200 language that it can mean, or else the only other
    one; two letters, and three of a group of languages, for the one that benchmarks mean by them.
    A code of that form that has no name comes back.

    Raises:
        ValueError: The code is not known; or FLORES-200 has the language in several scripts, which
            the message lists.
    """
    language, _, script = code.replace("-", "_").partition("_")
    spelled = f"{language.lower()}_{script.capitalize()}"
    if spelled in NAMES or is_well_formed(code):
        return spelled
    if code.lower() in OTHER_CODES:
        return OTHER_CODES[code.lower()]
    of_language = [known for known in NAMES if known.startswith(f"{code.lower()}_")]
    same = [known for known in of_language if known in FLORES_200] or of_language
    if len(same) > 1:
        raise ValueError(
            f"language {code!r} is written in several scripts: choose one of {', '.join(same)}"
        )
    return same[0] if same else check_language(code)


def nllb_token(code: str) -> str:
    """The token that NLLB-200 uses for a FLORES-200 code."""
    # NLLB's vocabulary names Santali by the wrong script.
    return "sat_Beng" if code == "sat_Olck" else code


def check_language(code: str, known: Collection[str] = NAMES) -> str:
    """Returns the code; one of ISO 639-3's private range passes where all that have names do.

    Raises:
        ValueError: It is not known; the message suggests the nearest known ones.
    """
    if code in known or (known is NAMES and _PRIVATE.fullmatch(code)):
        return code
    raise ValueError(f"unknown language {code!r}; did you mean {', '.join(nearest(code, known))}?")


def check_code(code: str) -> str:
    """Returns the code of texts that no encoder is there to be asked about: one that has a name, or
    one of that form for a language that has none, which an encoder may have a token for.

    Raises:
        ValueError: It is not known; the message suggests the nearest known ones.
    """
    language = code.partition("_")[0]
    is_here = language in OTHER_CODES or any(each.startswith(f"{language}_") for each in NAMES)
    return code if is_well_formed(code) and not is_here else check_language(code)


def nearest(code: str, known: Collection[str] = NAMES) -> list[str]:
    """The three known codes that a code is most like; the one whose other code, or
    English name, it is comes first."""
    # "Greek" is FLORES-200's, not that of an encoder that was trained on Greek in Latin script.
    names = {NAMES[each].lower(): each for each in (*NAMES, *FLORES_200)}
    meant = OTHER_CODES.get(code.lower()) or names.get(code.lower().replace("_", " "))
    alike = sorted(known, key=lambda language: _similarity(code, language), reverse=True)
    return sorted(alike, key=lambda language: language != meant)[:3]


def _similarity(typed: str, language: str) -> tuple[float, int, float]:
    """How alike the languages are, then the codes: half of all end in _Latn, which says little."""
    ours, theirs = typed.lower().replace("-", "_"), language.lower()
    by_language = SequenceMatcher(None, ours.partition("_")[0], theirs.partition("_")[0]).ratio()
    by_code = SequenceMatcher(None, ours, theirs).ratio()
    return by_language, len(commonprefix([ours, theirs])), by_code
