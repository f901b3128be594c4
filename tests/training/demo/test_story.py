import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import expertune
from expertune.training.demo import story
from expertune.training.demo.stock import Agreement, compare_with_stock
from expertune.training.demo.story import MARK, DemoResult, claim, run_demo, tell
from expertune.training.errors import UserError
from expertune.training.recipe_file import load_recipe

SHORT = {"max_steps": 3, "warmup_steps": 0, "per_device_train_batch_size": 16}
SAME = Agreement(difference=1e-6, rounding=1e-6, num_logits=10)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "_NUM_TRAIN", 64)
    monkeypatch.setattr(story, "_NUM_HELD_OUT", 12)


def test_the_whole_story_in_a_few_steps_and_once_more(tmp_path: Path) -> None:
    folder, shown = tmp_path / "demo", io.StringIO()
    for _ in range(2):
        result = tell(folder, seed=0, console=Console(file=shown, width=120), overrides=SHORT)
    assert all(0 <= score <= 100 for score in (result.repeats, result.before, result.after))
    assert result.agreement.holds
    assert result.agreement.rounding > 0
    for name in ("repeat/model", "spanish/adapter", "repeat/loss.png", "spanish/loss.png", "spanish/recipe.yaml"):
        assert (folder / name).exists()
        assert str(folder / name) in shown.getvalue()
    assert load_recipe(folder / "spanish" / "recipe.yaml").max_steps == 3

    # the bound tells a slightly wrong factor of one expert from rounding
    base, adapter = folder / "repeat" / "model", folder / "spanish" / "adapter"
    model, tokenizer = expertune.load(str(adapter))
    texts = ["<user> the cat sees a dog <parrot> el gato ve un perro <end>"]
    _make_adapters_count(model)
    model.save_pretrained(folder / "louder")
    assert compare_with_stock(model, tokenizer, base, folder / "louder", texts).holds
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "experts" in name and "lora_B" in name).mul_(1.001)
    assert not compare_with_stock(model, tokenizer, base, folder / "louder", texts).holds
    assert not compare_with_stock(model, tokenizer, base, adapter, texts).holds


def _make_adapters_count(model: Any) -> None:
    """Adapters of three steps do next to nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize(
    ("before", "after", "agreement", "words"),
    [
        (0.0, 100.0, SAME, []),
        (50.0, 50.0, SAME, ["did not help: 50.0 %"]),
        (0.0, 90.0, Agreement(difference=9e-6, rounding=1e-6, num_logits=10), ["other logits"]),
        (0.0, 90.0, Agreement(difference=float("nan"), rounding=1e-6, num_logits=10), ["other logits"]),
        (0.0, 0.0, Agreement(difference=1.0, rounding=1e-6, num_logits=10), ["did not help", "other logits"]),
    ],
)
def test_failures(before: float, after: float, agreement: Agreement, words: list[str]) -> None:
    result = DemoResult(output_dir=Path(), repeats=100.0, before=before, after=after, agreement=agreement)
    assert len(result.failures()) == len(words)
    assert all(word in failure for word, failure in zip(words, result.failures(), strict=True))


def test_a_failure_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = DemoResult(output_dir=tmp_path, repeats=100.0, before=0.0, after=0.0, agreement=SAME)
    monkeypatch.setattr(story, "tell", lambda *_, **__: failed)
    num_threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="did not help"):
        run_demo(tmp_path)
    assert torch.get_num_threads() == num_threads


def test_another_folder_is_not_touched(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("ten years", encoding="utf-8")
    with pytest.raises(UserError, match="no demo wrote"):
        claim(mine, seed=0)
    with pytest.raises(UserError, match="is a file"):
        claim(mine / "thesis.txt", seed=0)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        claim(tmp_path / name, seed=0)
        claim(tmp_path / name, seed=0)
        assert [path.name for path in (tmp_path / name).iterdir()] == [MARK]
