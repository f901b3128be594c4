"""The demo's generated data: English sentences, and the same ones in Spanish.

    the black cat sees a turtle   ->   el gato negro ve una tortuga

Article and adjective agree with the noun, and the adjective moves behind it, so that no word-by-word table answers.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# English: masculine, feminine
ARTICLES = {"the": ("el", "la"), "a": ("un", "una")}
ADJECTIVES = {
    "red": ("rojo", "roja"),
    "white": ("blanco", "blanca"),
    "black": ("negro", "negra"),
    "yellow": ("amarillo", "amarilla"),
    "small": ("pequeño", "pequeña"),
    "tired": ("cansado", "cansada"),
    "beautiful": ("hermoso", "hermosa"),
    "big": ("grande", "grande"),
}
MASCULINE = {
    "cat": "gato",
    "dog": "perro",
    "bear": "oso",
    "horse": "caballo",
    "bird": "pájaro",
    "fox": "zorro",
    "tree": "árbol",
    "boat": "barco",
}
FEMININE = {
    "cow": "vaca",
    "frog": "rana",
    "bee": "abeja",
    "whale": "ballena",
    "turtle": "tortuga",
    "moon": "luna",
    "house": "casa",
    "star": "estrella",
}
VERBS = {
    "sees": "ve",
    "wants": "quiere",
    "paints": "pinta",
    "finds": "encuentra",
    "follows": "sigue",
    "draws": "dibuja",
    "carries": "lleva",
    "hears": "oye",
}
NOUNS = (*MASCULINE, *FEMININE)
_ADJECTIVE_SHARE = 0.7
_HELD_OUT_NOUNS = 2  # for each adjective


@dataclass(frozen=True)
class Sentence:
    """One sentence in both languages."""

    english: str
    spanish: str


@dataclass(frozen=True)
class Phrase:
    """A noun with its article and perhaps an adjective, by their English words."""

    article: str
    adjective: str | None
    noun: str

    @property
    def pair(self) -> tuple[str | None, str]:
        """The adjective and the noun that stand together."""
        return self.adjective, self.noun

    def english(self) -> str:
        """Article, adjective, noun."""
        return " ".join(word for word in (self.article, self.adjective, self.noun) if word)

    def spanish(self) -> str:
        """Article, noun, adjective, all of the noun's gender."""
        gender = 0 if self.noun in MASCULINE else 1
        words = [ARTICLES[self.article][gender], (MASCULINE | FEMININE)[self.noun]]
        if self.adjective:
            words.append(ADJECTIVES[self.adjective][gender])
        return " ".join(words)


class Questions:
    """Draws sentences to train on, and held-out ones that share no adjective-noun pair with them.

    Args:
        seed: the same seed draws the same sentences in the same order.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.held_out_pairs = frozenset(
            (adjective, noun) for adjective in ADJECTIVES for noun in self._rng.sample(NOUNS, _HELD_OUT_NOUNS)
        )

    def train(self, number: int) -> list[Sentence]:
        """Sentences without a held-out pair; a few may come twice."""
        return [self._sentence(self._known_phrase(), self._known_phrase()) for _ in range(number)]

    def held_out(self, number: int) -> list[Sentence]:
        """Different sentences, each with at least one pair of words that never stands together in `train`."""
        found: dict[Sentence, None] = {}
        pairs = sorted(self.held_out_pairs)
        while len(found) < number:
            phrases = [self._known_phrase(), Phrase(self._rng.choice(list(ARTICLES)), *self._rng.choice(pairs))]
            self._rng.shuffle(phrases)
            found[self._sentence(*phrases)] = None
        return list(found)

    def _known_phrase(self) -> Phrase:
        while True:
            adjective = self._rng.choice(list(ADJECTIVES)) if self._rng.random() < _ADJECTIVE_SHARE else None
            phrase = Phrase(self._rng.choice(list(ARTICLES)), adjective, self._rng.choice(NOUNS))
            if phrase.pair not in self.held_out_pairs:
                return phrase

    def _sentence(self, subject: Phrase, thing: Phrase) -> Sentence:
        verb = self._rng.choice(list(VERBS))
        return Sentence(
            english=f"{subject.english()} {verb} {thing.english()}",
            spanish=f"{subject.spanish()} {VERBS[verb]} {thing.spanish()}",
        )


def vocabulary() -> list[str]:
    """Every word of both languages, sorted."""
    words = {*ARTICLES, *ADJECTIVES, *NOUNS, *VERBS, *MASCULINE.values(), *FEMININE.values(), *VERBS.values()}
    for forms in (*ARTICLES.values(), *ADJECTIVES.values()):
        words.update(forms)
    return sorted(words)


def repeating(sentences: Iterable[Sentence]) -> list[tuple[str, str]]:
    """The base task, question and answer: say the same again, English and Spanish in turn."""
    spoken = (s.spanish if i % 2 else s.english for i, s in enumerate(sentences))
    return [(said, said) for said in spoken]


def translating(sentences: Iterable[Sentence]) -> list[tuple[str, str]]:
    """The new behaviour, question and answer: asked in English, answer in Spanish."""
    return [(sentence.english, sentence.spanish) for sentence in sentences]


def write_jsonl(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """One conversation a line, `{"messages": [user, assistant]}`."""
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
