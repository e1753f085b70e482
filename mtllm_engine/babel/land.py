"""Babel's land: what can be meant, how each language says it, and which texts there are.

It is a pure function of the seed. A clause is meant once and said in any language. English is one
of them. Every other language has roots, markers and an order of its own, and hears the syllables of
a name in its own way.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mtllm_engine.languages import ENGLISH

CATEGORIES = (
    "science/technology",
    "travel",
    "politics",
    "sports",
    "health",
    "entertainment",
    "geography",
)
RELATIONS = ("entailment", "neutral", "contradiction")  # in the order of MNLI's labels

NOUNS = ("farmer", "guest", "friend", "bird", "dog", "house", "garden", "window", "letter", "boat")
ADJECTIVES = ("old", "small", "red", "quiet", "happy")
VERBS = ("visit", "remember", "follow", "paint", "greet", "want")
PLACES = ("near", "behind", "under")
TIMES = ("today", "often", "again")
TOPICS = {  # by category: nouns, and a verb, that only its members have to do with
    "science/technology": (("robot", "laser", "satellite"), "invent"),
    "travel": (("hotel", "ticket", "airport"), "book"),
    "politics": (("minister", "election", "parliament"), "govern"),
    "sports": (("goal", "coach", "stadium"), "kick"),
    "health": (("doctor", "hospital", "vaccine"), "heal"),
    "entertainment": (("film", "actor", "concert"), "perform"),
    "geography": (("mountain", "river", "island"), "border"),
}
TOPIC_NOUNS = tuple(noun for nouns, _ in TOPICS.values() for noun in nouns)
TOPIC_VERBS = tuple(verb for _, verb in TOPICS.values())
CONTENT = (*NOUNS, *ADJECTIVES, *VERBS, *PLACES, *TIMES, *TOPIC_NOUNS, *TOPIC_VERBS)
TENSES = ("present", "past", "future")
NAMED = 0.7  # share of the MT training sentences with a name in them
INHERITED = 0.75  # share of a language's words that come from its parent

_FIRST = "bro dan kel mir sol tav wes zan gri hul jor lem nos pel rud fay"
_SECOND = "bert ton vik lan dor mas rin gul sen pax hom fed jin kar zel wyn"
FIRST, SECOND = tuple(_FIRST.split()), tuple(_SECOND.split())  # syllables of names


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A participant: a common noun, described or not, or a name."""

    noun: str | tuple[str, str]  # the root, or the syllables of a name
    adjective: str = ""
    plural: bool = False


@dataclass(frozen=True, kw_only=True)
class Clause:
    """What a sentence means, before any language says it."""

    subject: Thing
    verb: str
    object: Thing
    tense: str
    place: tuple[str, Thing] | None = None
    time: str = ""


Inference = tuple[Clause, Clause, str]  # premise, hypothesis and their relation


@dataclass(frozen=True, kw_only=True)
class Entity:
    """Someone or something with a name, and the category that its facts are about."""

    name: tuple[str, str]
    category: str


@dataclass(frozen=True, kw_only=True)
class Language:
    """How clauses are said. Markers are templates: `{}ed`, `ka{}`, `will {}`."""

    code: str
    order: str  # of Subject, Verb, Object, Place and Time
    adjective_first: bool
    preposition: bool
    article: str
    markers: Mapping[str, str]  # plural, object and the tenses
    roots: Mapping[str, str]  # by English root
    syllables: Mapping[str, str]  # by English syllable
    pairs: int = 0  # sentences of MT training data
    cognates: float = 0.0  # share of the roots that come from English
    parent: str = ""

    def say(self, clause: Clause) -> str:
        """The clause as a sentence."""
        parts = {
            "S": self._name(clause.subject),
            "V": self.markers[clause.tense].format(self.roots[clause.verb]),
            "O": self._name(clause.object, self.markers["object"]),
            "P": self._place(*clause.place) if clause.place else "",
            "T": self.roots[clause.time] if clause.time else "",
        }
        return " ".join(parts[part] for part in self.order if parts[part]) + "."

    def name(self, name: tuple[str, str]) -> str:
        """An entity's name, syllable by syllable."""
        return "".join(self.syllables[syllable] for syllable in name).capitalize()

    def _name(self, thing: Thing, case: str = "{}") -> str:
        if isinstance(thing.noun, tuple):
            return case.format(self.name(thing.noun))
        noun = self.roots[thing.noun]
        noun = case.format(self.markers["plural"].format(noun) if thing.plural else noun)
        adjective = self.roots[thing.adjective] if thing.adjective else ""
        described = (adjective, noun) if self.adjective_first else (noun, adjective)
        return " ".join(word for word in (self.article, *described) if word)

    def _place(self, relation: str, thing: Thing) -> str:
        words = (self.roots[relation], self._name(thing))
        return " ".join(words if self.preposition else words[::-1])


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """What is decided about a language before its words are drawn."""

    code: str
    order: str
    adjective_first: bool
    preposition: bool
    article: bool
    prefixes: bool  # markers come before the root
    consonants: str
    vowels: str
    pairs: int
    cognates: float = 0.0
    parent: str = ""  # a language before it, whose roots it shares but for a sound change
    sounds: Mapping[str, str] = field(default_factory=dict)


SKETCHES = (
    Sketch(
        code="qaa_Latn",
        order="TSPOV",
        adjective_first=True,
        preposition=False,
        article=False,
        prefixes=False,
        consonants="ptkmnsly",
        vowels="aeiou",
        pairs=5000,
    ),
    Sketch(
        code="qab_Latn",
        order="VSOPT",
        adjective_first=False,
        preposition=True,
        article=True,
        prefixes=True,
        consonants="bdgzrnmw",
        vowels="aiu",
        pairs=5000,
    ),
    Sketch(
        code="qac_Latn",
        order="SVPOT",
        adjective_first=False,
        preposition=True,
        article=True,
        prefixes=False,
        consonants="bcdflmnprstv",
        vowels="aeio",
        pairs=5000,
        cognates=0.2,
    ),
    Sketch(
        code="qad_Latn",
        order="TSVPO",
        adjective_first=False,
        preposition=True,
        article=True,
        prefixes=False,
        consonants="bcdflmnprstv",
        vowels="aeio",
        pairs=1500,
        cognates=0.2,
        parent="qac_Latn",
        sounds={"p": "b", "t": "d", "c": "g", "a": "e", "o": "u"},
    ),
    Sketch(
        code="qae_Latn",
        order="SOVTP",
        adjective_first=False,
        preposition=False,
        article=False,
        prefixes=False,
        consonants="fghklrwz",
        vowels="eiou",
        pairs=300,
    ),
    Sketch(
        code="qaf_Latn",
        order="SPTOV",
        adjective_first=True,
        preposition=False,
        article=False,
        prefixes=False,
        consonants="ptkmnsly",
        vowels="aeiou",
        pairs=300,
        parent="qaa_Latn",
        sounds={"p": "f", "t": "s", "k": "h", "e": "i", "l": "r"},
    ),
)


@dataclass(frozen=True, kw_only=True)
class Land:
    """Languages and entities, and the texts that are drawn from them."""

    seed: int
    english: Language
    foreign: tuple[Language, ...]
    entities: Mapping[str, tuple[Entity, ...]]
    """By split: train, dev, test; a category's share is equal in each."""

    @property
    def languages(self) -> tuple[Language, ...]:
        return (self.english, *self.foreign)

    @cached_property
    def everyone(self) -> tuple[Entity, ...]:
        return tuple(itertools.chain.from_iterable(self.entities.values()))

    @cached_property
    def meanings(self) -> tuple[Clause, ...]:
        """What the MT data mean: a language has said the first `pairs` of them.

        No sentence has a name and a topic.
        """
        return tuple(itertools.islice(self._plain_clauses("parallel"), self.english.pairs))

    def lines(self, split: str, count: int) -> list[Clause]:
        """What a test set of translation means, line by line; nothing that the MT data mean too."""
        trained = set(self.meanings)
        clauses = self._plain_clauses(f"lines/{split}")
        untrained = (clause for clause in clauses if clause not in trained)
        return list(itertools.islice(untrained, count))

    def documents(
        self, split: str, count: int, *, sentences: tuple[int, int] = (1, 3)
    ) -> list[str]:
        """English documents, about one category at a time.

        Args:
            sentences: Of a document, at least and at most; their number is log-uniform.
        """
        rng = self._rng(f"documents/{split}")
        low, high = sentences
        lengths = [int(low * ((high + 1) / low) ** rng.random()) for _ in range(count)]
        return [" ".join(itertools.islice(self._story(rng), length)) for length in lengths]

    def task(self, split: str, count: int) -> list[tuple[Clause, str]]:
        """Clauses that mention two entities of the split and of one category, and that category.

        All categories come equally often.
        """
        rng = self._rng(f"task/{split}")
        examples = []
        for number in range(count):
            category = CATEGORIES[number % len(CATEGORIES)]
            mentioned = rng.sample(self._members(split, category), 2)
            examples.append((_meeting(rng, mentioned), category))
        rng.shuffle(examples)
        return examples

    def inferences(self, split: str, count: int) -> list[Inference]:
        """Premises, hypotheses and the relation between them; all three relations equally often.

        A premise mentions two entities of the split and of two categories, a hypothesis two topics
        of two categories. Whoever of the premise it is about, the hypothesis fits if the categories
        are the same and does not if none is; if one is, it depends. So neither sentence tells the
        relation alone, whatever is known of its names.
        """
        rng = self._rng(f"inferences/{split}")
        examples = []
        for number in range(count):
            # The less the two overlap, the further they start apart.
            start = number % len(RELATIONS)
            categories = rng.sample(CATEGORIES, 4)
            mentioned = [rng.choice(self._members(split, category)) for category in categories[:2]]
            claimed = rng.sample(categories[start : start + 2], 2)
            examples.append((_meeting(rng, mentioned), _claim(rng, claimed), RELATIONS[start]))
        rng.shuffle(examples)
        return examples

    def _members(self, split: str, category: str) -> list[Entity]:
        return [entity for entity in self.entities[split] if entity.category == category]

    def _plain_clauses(self, what: str) -> Iterator[Clause]:
        rng = self._rng(what)
        while True:
            named = rng.sample(self.everyone, rng.choice((1, 2, 2, 3)))
            yield _meeting(rng, named) if rng.random() < NAMED else _medley(rng)

    def _story(self, rng: random.Random) -> Iterator[str]:
        """Endless sentences: one mentions entities of a category, none or some tell facts of them.

        Who is mentioned together belongs together here, as in any newspaper; in the MT data names
        meet by chance.
        """
        while True:
            category = rng.choice(CATEGORIES)
            members = [entity for entity in self.everyone if entity.category == category]
            yield self.english.say(_meeting(rng, rng.sample(members, rng.randint(1, 3))))
            for _ in range(rng.choice((0, 0, 1, 2, 3))):
                yield self.english.say(_fact(rng, rng.choice(members)))

    def _rng(self, what: str) -> random.Random:
        return random.Random(f"{self.seed}/{what}")


def build_land(seed: int, pairs: float = 1.0) -> Land:
    """Draws languages and entities.

    Args:
        pairs: MT training data as a multiple of what the sketches say.
    """
    sketches = [
        dataclasses.replace(sketch, pairs=round(pairs * sketch.pairs)) for sketch in SKETCHES
    ]
    languages: dict[str, Language] = {ENGLISH: _english(max(sketch.pairs for sketch in sketches))}
    for sketch in sketches:
        rng = random.Random(f"{seed}/{sketch.code}")
        languages[sketch.code] = _language(rng, sketch, languages)
    english, *foreign = languages.values()
    return Land(
        seed=seed,
        english=english,
        foreign=tuple(foreign),
        entities=_entities(random.Random(f"{seed}/names")),
    )


def _entities(rng: random.Random) -> dict[str, tuple[Entity, ...]]:
    """Twelve of each category: six to train on, two to choose by, four to test with."""
    names = rng.sample(list(itertools.product(FIRST, SECOND)), 12 * len(CATEGORIES))
    entities = [
        Entity(name=name, category=category)
        for name, category in zip(names, itertools.cycle(CATEGORIES))
    ]
    bounds = [6 * len(CATEGORIES), 8 * len(CATEGORIES)]
    return {
        "train": tuple(entities[: bounds[0]]),
        "dev": tuple(entities[bounds[0] : bounds[1]]),
        "test": tuple(entities[bounds[1] :]),
    }


def _meeting(rng: random.Random, entities: Sequence[Entity]) -> Clause:
    """A clause with the entities in some of its parts, and nothing to do with their categories."""
    things = {part: _common(rng, NOUNS, plural=part == "O") for part in "SOP"}
    named = dict(zip(rng.sample("SOP", len(entities)), entities))
    things |= {part: Thing(noun=entity.name) for part, entity in named.items()}
    return Clause(
        subject=things["S"],
        verb=rng.choice(VERBS),
        object=things["O"],
        tense=rng.choice(TENSES),
        place=(rng.choice(PLACES), things["P"]) if "P" in named or rng.random() < 0.4 else None,
        time=rng.choice(TIMES) if rng.random() < 0.3 else "",
    )


def _medley(rng: random.Random) -> Clause:
    """A clause without a name; topics of all categories come mixed."""
    return Clause(
        subject=_common(rng, (*NOUNS, *TOPIC_NOUNS)),
        verb=rng.choice((*VERBS, *TOPIC_VERBS)),
        object=_common(rng, (*NOUNS, *TOPIC_NOUNS), plural=True),
        tense=rng.choice(TENSES),
        place=_medley_place(rng) if rng.random() < 0.4 else None,
        time=rng.choice(TIMES) if rng.random() < 0.3 else "",
    )


def _medley_place(rng: random.Random) -> tuple[str, Thing]:
    return rng.choice(PLACES), _common(rng, (*NOUNS, *TOPIC_NOUNS))


def _fact(rng: random.Random, entity: Entity) -> Clause:
    """A clause that says what the entity has to do with."""
    nouns, verb = TOPICS[entity.category]
    return Clause(
        subject=Thing(noun=entity.name) if rng.random() < 0.6 else _common(rng, nouns),
        verb=verb if rng.random() < 0.6 else rng.choice(VERBS),
        object=_common(rng, nouns, plural=True),
        tense=rng.choice(TENSES),
        place=(rng.choice(PLACES), _common(rng, nouns)) if rng.random() < 0.3 else None,
    )


def _claim(rng: random.Random, categories: Sequence[str]) -> Clause:
    """A clause without a name, with a topic of each of two categories."""
    first, second = (TOPICS[category][0] for category in categories)
    return Clause(
        subject=_common(rng, first),
        verb=rng.choice(VERBS),
        object=_common(rng, second, plural=True),
        tense=rng.choice(TENSES),
    )


def _common(rng: random.Random, nouns: Sequence[str], *, plural: bool = False) -> Thing:
    return Thing(
        noun=rng.choice(nouns),
        adjective=rng.choice(ADJECTIVES) if rng.random() < 0.3 else "",
        plural=plural and rng.random() < 0.3,
    )


def _english(pairs: int) -> Language:
    return Language(
        code=ENGLISH,
        order="SVOPT",
        adjective_first=True,
        preposition=True,
        article="the",
        markers={
            "plural": "{}s",
            "object": "{}",
            "present": "{}s",
            "past": "{}ed",
            "future": "will {}",
        },
        roots={word: word for word in CONTENT},
        syllables={syllable: syllable for syllable in (*FIRST, *SECOND)},
        pairs=pairs,
    )


def _language(rng: random.Random, sketch: Sketch, others: Mapping[str, Language]) -> Language:
    endings = ("", *sketch.consonants[:3])
    syllables = [a + b + c for a in sketch.consonants for b in sketch.vowels for c in endings]
    parent = others.get(sketch.parent)

    def old_root(word: str) -> str:
        if parent:
            return _shift(parent.roots[word], sketch.sounds) if rng.random() < INHERITED else ""
        return word[:4] + rng.choice(sketch.vowels) if rng.random() < sketch.cognates else ""

    def old_syllable(syllable: str) -> str:
        inherits = parent and rng.random() < INHERITED
        return _shift(parent.syllables[syllable], sketch.sounds) if inherits else ""

    # With such a syllable for each of English, names can be taken apart again.
    closed = [syllable for syllable in syllables if len(syllable) == 3]
    words = _coin(rng, syllables, 2)
    affixes = [
        rng.choice(sketch.vowels) + consonant
        for consonant in rng.sample(sketch.consonants, 1 + 1 + len(TENSES))
    ]
    markers = [f"{affix[::-1]}{{}}" if sketch.prefixes else f"{{}}{affix}" for affix in affixes]
    return Language(
        code=sketch.code,
        order=sketch.order,
        adjective_first=sketch.adjective_first,
        preposition=sketch.preposition,
        article=next(words)[:2] if sketch.article else "",
        markers=dict(zip(("plural", "object", *TENSES), markers)),
        roots=_lexicon(CONTENT, old_root, words),
        syllables=_lexicon((*FIRST, *SECOND), old_syllable, _coin(rng, closed, 1)),
        pairs=sketch.pairs,
        cognates=sketch.cognates,
        parent=sketch.parent,
    )


def _shift(word: str, sounds: Mapping[str, str]) -> str:
    return "".join(sounds.get(letter, letter) for letter in word)


def _lexicon(keys: Sequence[str], old: Callable[[str], str], new: Iterator[str]) -> dict[str, str]:
    """For each key its old word, or a new one if it has none or one that sounds like another."""
    lexicon: dict[str, str] = {}
    taken = set()
    for key in keys:
        word = old(key)
        while not word or word in taken:
            word = next(new)
        lexicon[key] = word
        taken.add(word)
    return lexicon


def _coin(rng: random.Random, syllables: Sequence[str], count: int) -> Iterator[str]:
    while True:
        yield "".join(rng.choices(syllables, k=count))
