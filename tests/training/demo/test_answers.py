import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertune.training.demo.answers import answer, exact_match
from expertune.training.demo.model import build_tokenizer, save_untrained


def test_exact_match_is_word_for_word() -> None:
    assert exact_match(["el gato", "la vaca", "", "el oso ve"], ["el gato", "la vaca roja", "el", "el oso ve"]) == 50.0
    assert exact_match(["a"], ["b"]) == 0.0
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], ["a", "b"])


def test_a_conversation_is_one_token_a_word_and_only_the_answer_is_marked() -> None:
    tokenizer = build_tokenizer(["el", "gato", "the", "cat"])
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "el gato"}]
    encoded = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    words = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert words == ["<user>", "the", "cat", "<parrot>", "el", "gato", "<end>"]
    learnt = [word for word, mask in zip(words, encoded["assistant_masks"], strict=True) if mask]
    assert learnt == ["el", "gato", "<end>"]
    prompt = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.tokenize(prompt) == words[:4]


def test_an_answer_in_a_batch_is_the_answer_alone(tmp_path) -> None:
    save_untrained(tmp_path, ["el", "gato", "the", "cat", "red"], seed=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    questions = ["the red cat", "cat", "the cat the red cat el gato"]
    model.train()
    together = answer(model, tokenizer, questions)
    assert together == [answer(model, tokenizer, [question])[0] for question in questions]
    assert any(together)
    assert not set(" ".join(together).split()) & {"<pad>", "<end>", "<user>"}
    assert model.training


def test_the_same_seed_makes_the_same_model_and_moves_no_other_random_number(tmp_path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_untrained(tmp_path / name, ["el"], seed=seed)
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.rand(3), expected)
