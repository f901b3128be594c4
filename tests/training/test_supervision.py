import pytest
from datasets import Dataset

from expertune.training.errors import UserError
from expertune.training.supervision import (
    check_chat_template,
    check_positions,
    check_vocabulary,
    ends_with_any,
    supervise,
)
from tests.training.conftest import CHAT, UNMARKED, make_tokenizer


def tokens(*labels: list[int]) -> Dataset:
    return Dataset.from_list([{"input_ids": list(range(len(row))), "labels": row, "prompt": "p"} for row in labels])


def test_counts_and_cuts() -> None:
    answer, long_answer, long_text = [-100, -100, 2, 3], [-100, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4]
    result = supervise(tokens(answer, long_answer, long_text), ["a", "b", "c"], max_length=4)
    # the first label is never predicted
    assert (result.num_tokens, result.num_supervised, result.num_cut) == (12, 2 + 3 + 3, 2)
    assert list(result.dataset["labels"]) == [answer, long_answer[:4], long_text[:4]]
    assert list(result.dataset["input_ids"]) == [[0, 1, 2, 3]] * 3
    assert "the loss is on 8 of them (67 %)" in str(result)


@pytest.mark.parametrize(
    ("labels", "ends"),
    [
        ([[1, 9], [1, 2]], True),
        ([[9, -100], [1, 2]], True),
        ([[1, 9, 2, 2]], True),
        ([[9, 1, 1, 1], [-100, 5]], False),
        ([[]], False),
    ],
)
def test_whether_any_row_ends_with_a_stop(labels: list[list[int]], ends: bool) -> None:
    """With a line's end behind it, or the next turn's words that are not learnt."""
    assert ends_with_any(Dataset.from_dict({"labels": labels}), {8, 9}) is ends


def test_makes_labels_of_the_masks_of_an_older_trl() -> None:
    masked = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}]
    assert supervise(Dataset.from_list(masked), ["a"], max_length=9).dataset[0]["labels"] == [-100, 6, -100]
    assert supervise(Dataset.from_list([{"input_ids": [5, 6]}]), ["a"], max_length=9).dataset[0]["labels"] == [5, 6]


def test_without_max_length_nothing_is_cut() -> None:
    result = supervise(tokens([-100, *range(50)]), ["a"], max_length=None)
    assert (result.num_tokens, result.num_supervised, result.num_cut) == (51, 50, 0)


def test_names_the_row_whose_answer_is_cut_off() -> None:
    with pytest.raises(UserError, match=r"^data, line 2: the prompt alone fills max_length=3 tokens.*Raise max_length"):
        supervise(tokens([-100, 1], [-100, -100, -100, 1]), ["data, line 1", "data, line 2"], max_length=3)


def test_names_the_row_without_a_supervised_token() -> None:
    with pytest.raises(UserError, match=r"^a \(and 1 more rows\): no token to learn from"):
        supervise(tokens([-100, -100], [1, 1], [5]), ["a", "b", "c"], max_length=3)


def test_names_the_row_beyond_the_positions_of_the_model() -> None:
    result, where = supervise(tokens([1] * 4, [1] * 7, [1] * 9), ["a", "b", "c"], max_length=None), ["a", "b", "c"]
    with pytest.raises(UserError, match=r"^b \(and 1 more rows\): 7 tokens are beyond the 6 .*Set max_length=6,"):
        check_positions(result, where, 6)
    for enough in (9, None):
        check_positions(result, where, enough)


def test_chat_template() -> None:
    check_chat_template(make_tokenizer(CHAT))
    with pytest.raises(UserError, match=r"does not mark what the assistant says.*chat_template_path"):
        check_chat_template(make_tokenizer(UNMARKED))


def test_names_the_row_with_a_token_that_the_model_has_not() -> None:
    tokenizer = make_tokenizer()
    result = supervise(tokens([1] * 4, [1] * 7, [1] * 9), ["a", "b", "c"], max_length=None)
    check_vocabulary(result, ["a", "b", "c"], tokenizer, num_embeddings=9)
    with pytest.raises(UserError, match=r"^b \(and 1 more rows\): token 6, .* beyond the 6 .* the tokenizer has 259"):
        check_vocabulary(result, ["a", "b", "c"], tokenizer, num_embeddings=6)
    tokenizer.add_special_tokens({"pad_token": "<fill>"})
    with pytest.raises(UserError, match=r"^what batches are padded with: token 259, '<fill>', is beyond the 259"):
        check_vocabulary(result, ["a", "b", "c"], tokenizer, num_embeddings=259)
