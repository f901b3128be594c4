import json
from pathlib import Path

import pytest

from expertune.training.demo.questions import (
    ADJECTIVES,
    Phrase,
    Questions,
    Sentence,
    repeating,
    translating,
    vocabulary,
    write_jsonl,
)


def test_article_and_adjective_agree_and_the_adjective_follows() -> None:
    assert Phrase("the", "black", "cat").english() == "the black cat"
    assert Phrase("the", "black", "cat").spanish() == "el gato negro"
    assert Phrase("a", "black", "turtle").spanish() == "una tortuga negra"
    assert Phrase("a", None, "moon").spanish() == "una luna"


def test_the_same_seed_draws_the_same() -> None:
    first, second, other = Questions(3), Questions(3), Questions(4)
    assert first.held_out(20) == second.held_out(20)
    assert first.train(50) == second.train(50)
    assert Questions(3).held_out(20) != other.held_out(20)


@pytest.mark.parametrize("seed", range(5))
def test_held_out_questions_share_no_pair_of_words_with_training(seed: int) -> None:
    questions = Questions(seed)
    held_out, train = questions.held_out(200), questions.train(4000)
    # with a blank before it: "red bee" is no part of "tired bee"
    pairs = {" " + " ".join(pair) for pair in questions.held_out_pairs}
    assert len(set(held_out)) == 200
    assert not set(held_out) & set(train)
    assert all(any(pair in sentence.english for pair in pairs) for sentence in held_out)
    assert not any(pair in sentence.english for pair in pairs for sentence in train)
    # no word is new, only what it stands beside
    assert _words(held_out) <= _words(train)
    assert {adjective for adjective, _ in questions.held_out_pairs} == set(ADJECTIVES)


def test_the_vocabulary_is_every_word() -> None:
    questions = Questions(0)
    assert _words([*questions.train(4000), *questions.held_out(100)]) == set(vocabulary())


def test_tasks() -> None:
    sentences = [
        Sentence("the cat sees a dog", "el gato ve un perro"),
        Sentence("a cow sees a dog", "una vaca ve un perro"),
    ]
    assert translating(sentences) == [(s.english, s.spanish) for s in sentences]
    assert repeating(sentences) == [(sentences[0].english,) * 2, (sentences[1].spanish,) * 2]


def test_rows_are_conversations(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [("the bird", "el pájaro")])
    row = json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8"))
    assert row == {"messages": [{"role": "user", "content": "the bird"}, {"role": "assistant", "content": "el pájaro"}]}


def _words(sentences: list[Sentence]) -> set[str]:
    return {word for s in sentences for word in (*s.english.split(), *s.spanish.split())}
