"""Whole runs on a tiny model."""

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from expertune import AdamW8bit
from expertune.training import run as run_module
from expertune.training import setup
from expertune.training.callbacks import Trainer
from expertune.training.errors import UserError
from expertune.training.recipe import Recipe
from expertune.training.recipe_file import load_recipe
from expertune.training.run import RunResult, run
from tests.training.conftest import CHAT, SUMS, UNMARKED

Make = Callable[..., Recipe]


def quiet(recipe: Recipe) -> RunResult:
    return run(recipe, Console(file=StringIO()))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers of a run."""
    made: list[Trainer] = []
    monkeypatch.setattr(run_module, "Trainer", lambda **kwargs: made.append(Trainer(**kwargs)) or made[-1])
    return made


def test_lora_from_the_recipe_to_stock_peft(make: Make, trained: list[Trainer], tmp_path: Path) -> None:
    output = StringIO()
    recipe = make(r=4, eval_size=4, eval_steps=2, save_steps=2, learning_rate=1e-2)
    result = run(recipe, Console(file=output, width=100))

    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {
        "adapter",
        "checkpoint-2",
        "expertune_run.json",
        "recipe.yaml",
        "metrics.jsonl",
        "loss.png",
    }
    assert json.loads((folder / "expertune_run.json").read_text())["status"] == "finished"
    assert load_recipe(folder / "recipe.yaml") == recipe
    versions = yaml.safe_load((folder / "recipe.yaml").read_text())["versions"]
    assert versions["torch"] == torch.__version__
    assert {"expertune", "transformers", "peft", "trl", "python", "device"} <= set(versions)

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"] is None) for line in lines] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (3, True),
    ]
    assert len(result.losses) == 3
    assert result.eval_losses[-1] < result.eval_losses[0]
    stages = ["reading the data", "loading the model", "attaching adapters", "tokenising", "evaluating", "first step"]
    places = [output.getvalue().index(f"{stage}") for stage in [*stages, "step 1/3", "saving"]]
    assert places == sorted(places)

    stock = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, result.weights).eval()
    ids = AutoTokenizer.from_pretrained(result.weights)("1+2=3", return_tensors="pt").input_ids
    ours = trained[0].model.eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)
        with stock.disable_adapter():
            assert not torch.allclose(stock(ids).logits, ours(ids).logits, rtol=1e-3, atol=1e-3)


def test_full_fine_tuning_saves_a_model(make: Make, tmp_path: Path) -> None:
    recipe = make(finetuning_type="full", router_aux_loss_coef=0.01, memory="fast", learning_rate=1e-3)
    result = quiet(recipe)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", output_loading_info=True)
    assert not any(info.values())
    assert not model.config.output_router_logits
    before = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path)
    same = [torch.equal(a, b.to(a.dtype)) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert not any(same)
    assert load_recipe(result.output_dir / "recipe.yaml") == recipe


def test_settings_of_generation_that_transformers_would_not_save_cost_no_weights(
    make: Make, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = shutil.copytree(make_base(), tmp_path / "base")
    asked = {"do_sample": False, "temperature": 0.3, "top_p": 0.9}
    (base / "generation_config.json").write_text(json.dumps(asked))
    result = quiet(make(model_name_or_path=str(base), finetuning_type="full"))
    assert asked.items() <= json.loads((result.weights / "generation_config.json").read_text()).items()
    model, info = AutoModelForCausalLM.from_pretrained(result.weights, output_loading_info=True)
    assert not any(info.values())
    assert model.generation_config.temperature == 0.3


def labels(make: Make, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> list[str]:
    """The text that the loss is on, a string a row; nothing is trained."""
    caught: list[list[str]] = []

    def catch(_recipe: Recipe, trainer: Trainer, *_rest: Any) -> RunResult:
        tokenizer = trainer.processing_class
        rows = trainer.train_dataset["labels"]
        caught.append([tokenizer.decode([token for token in row if token != -100]) for row in rows])
        return RunResult(output_dir=Path(), weights=Path(), records=())

    monkeypatch.setattr(run_module, "_train", catch)
    quiet(make(overwrite_output_dir=True, **fields))
    return caught[0]


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
SHARED = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in TALK]
ALPACA = {"instruction": "Add.", "input": "1+1", "output": "2"}
SHAPES: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "text": (None, {"text": "all of it"}, "all of it<eos>"),
    "strings": (None, {"prompt": "question ", "completion": "answer"}, "answer<eos>"),
    "message lists": (CHAT, {"prompt": TALK[:3], "completion": TALK[3:]}, "no<eos>"),
    "message lists, no marks": (UNMARKED, {"prompt": TALK[:3], "completion": TALK[3:]}, "no<eos>"),
    "messages": (CHAT, {"messages": TALK}, "ho<eos>no<eos>"),
    "sharegpt": (CHAT, {"conversations": SHARED}, "ho<eos>no<eos>"),
    "alpaca": (None, ALPACA, "2<eos>"),
    "alpaca, chat": (UNMARKED, ALPACA, "2<eos>"),
}


@pytest.mark.parametrize(("template", "row", "expected"), SHAPES.values(), ids=SHAPES)
def test_the_loss_is_on_the_response(
    template: str | None,
    row: dict[str, Any],
    expected: str,
    make: Make,
    make_base: Callable[..., Path],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = str(make_base(chat_template=template))
    data = str(write_rows([row] * 2))
    assert labels(make, monkeypatch, model_name_or_path=base, dataset_name=data) == [expected] * 2


def test_another_chat_template(
    make: Make, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT.replace("<eos>", "!"))
    data = str(write_rows([{"messages": TALK}]))
    assert labels(make, monkeypatch, dataset_name=data, chat_template_path=str(template)) == ["ho!no!"]


def test_packed_rows_do_not_see_each_other(make: Make, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = str(write_rows(SUMS[:6]))
    settings = {"dataset_name": rows, "max_steps": 1, "router_aux_loss_coef": 0}
    plain = quiet(make(**settings, per_device_train_batch_size=6, output_dir=str(tmp_path / "plain")))
    packed = quiet(make(**settings, packing=True, per_device_train_batch_size=1, output_dir=str(tmp_path / "packed")))
    assert packed.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_padding_to_few_lengths_changes_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, trained: list[Trainer], packing: bool
) -> None:
    """As on a GPU, where layers are replayed."""
    fields = {"router_aux_loss_coef": 0} if packing else {}
    recipe = make(packing=packing, learning_rate=1e-2, eval_size=4, overwrite_output_dir=True, **fields)
    results = []
    for multiple in (None, 16):
        monkeypatch.setattr(setup, "_length_multiple", lambda _, multiple=multiple: multiple)
        results.append(quiet(recipe))
    batch = next(iter(trained[1].get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 16 == 0
    assert (batch["labels"] == -100).any(), "nothing was padded"
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-5)
    assert results[0].eval_losses == pytest.approx(results[1].eval_losses, rel=1e-5)


def test_which_batches_are_padded_to_few_lengths(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [make(), make(packing=True), make(packing=True, router_aux_loss_coef=0)]
    for has_gpu, multiples in ((True, [128, None, 128]), (False, [None] * 3)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert [setup._length_multiple(recipe) for recipe in recipes] == multiples


@pytest.mark.parametrize(("name", "what"), [("n_gpu", "2 GPUs"), ("world_size", "2 processes")])
def test_more_than_one_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch, name: str, what: str) -> None:
    monkeypatch.setattr(SFTConfig, name, property(lambda _: 2))
    recipe = make()
    with pytest.raises(UserError, match=what):
        quiet(recipe)
    assert not Path(recipe.output_dir).exists()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"optim": "grokadamw"}, "grokadamw"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "lr_end"),
    ],
)
def test_an_earlier_run_stays_where_the_optimizer_cannot_be_made(
    make: Make, settings: dict[str, Any], what: str
) -> None:
    earlier = quiet(make())
    before = sorted(path.name for path in earlier.weights.iterdir())
    with pytest.raises(UserError, match=what):
        quiet(make(overwrite_output_dir=True, **settings))
    assert sorted(path.name for path in earlier.weights.iterdir()) == before


def test_home_is_understood(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert quiet(make(output_dir="~/a run", max_steps=1)).output_dir == tmp_path / "a run"


def test_an_adapter_is_trained_further(make: Make, tmp_path: Path) -> None:
    first = quiet(make(r=4, learning_rate=1e-2))
    again = make(model_name_or_path=str(first.weights), output_dir=str(tmp_path / "again"), learning_rate=1e-2)
    assert quiet(again).losses[0] < first.losses[0]
    with pytest.raises(UserError, match="is an adapter, which is trained further as it is; drop r"):
        quiet(make(model_name_or_path=str(first.weights), output_dir=str(tmp_path / "third"), r=16))


def test_a_model_with_attention_of_ours_alone_trains_and_says_so(make: Make, make_base: Callable[..., Path]) -> None:
    output = StringIO()
    result = run(make(model_name_or_path=str(make_base("gemma3_text"))), Console(file=output, width=200))
    assert "no experts" in output.getvalue()
    assert "attention of Gemma3TextModel: expertune" in output.getvalue()
    assert len(result.losses) == 3


def test_the_balance_loss_counts(make: Make, tmp_path: Path) -> None:
    def first_loss(name: str, **fields: Any) -> float:
        return quiet(make(max_steps=1, output_dir=str(tmp_path / name), **fields)).losses[0]

    off, on, as_model = (
        first_loss("0", router_aux_loss_coef=0),
        first_loss("1", router_aux_loss_coef=1),
        first_loss("n"),
    )
    assert on > off + 1  # it is at least 1 a layer where experts are balanced, and more where not
    assert as_model - off == pytest.approx((on - off) * 0.001, rel=1e-2)  # qwen3_moe's own coefficient


def test_eight_bit_adam_is_our_own(make: Make, trained: list[Trainer]) -> None:
    quiet(make(optim="adamw_8bit", learning_rate=3e-3, weight_decay=0.1))
    optimizer = trained[0].optimizer.optimizer  # within accelerate's
    assert type(optimizer) is AdamW8bit
    assert optimizer.defaults["lr"] == 3e-3
    assert 0.1 in [group["weight_decay"] for group in optimizer.param_groups]
    assert {state["step"] for state in optimizer.state.values()} == {3}


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
@pytest.mark.parametrize("casts", [True, False])
def test_an_adapter_in_float32_or_as_the_model(make: Make, trained: list[Trainer], casts: bool, optim: str) -> None:
    output = StringIO()
    fields = {"dtype": "bfloat16", "autocast_adapter_dtype": casts, "optim": optim, "learning_rate": 1e-2}
    result = run(make(**fields, max_steps=12, eval_size=8), Console(file=output, width=300))
    factors = [p for p in trained[0].model.parameters() if p.requires_grad]
    assert {p.dtype for p in factors} == {torch.float32 if casts else torch.bfloat16}
    assert ("round small updates away" in output.getvalue()) == (not casts and optim == "adamw_torch")
    assert result.eval_losses[-1] < 0.9 * result.eval_losses[0]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_llama4_is_trained(make: Make, make_base: Callable[..., Path], method: str) -> None:
    """TRL finds neither its decoder by the class's name for it, nor a balance loss where its config has settings."""
    base = str(make_base("llama4_text"))
    settings = {"r": 4} if method == "lora" else {"finetuning_type": "full"}
    result = quiet(make(model_name_or_path=base, learning_rate=1e-2, **settings))
    assert len(result.losses) == 3
    if method == "full":
        _, info = AutoModelForCausalLM.from_pretrained(result.weights, output_loading_info=True)
        assert not any(info.values())
    with pytest.raises(UserError, match="llama4_text has no balance loss"):
        quiet(make(model_name_or_path=base, router_aux_loss_coef=0.1, overwrite_output_dir=True))


def test_a_balance_loss_that_trl_cannot_compute_is_off(make: Make, make_base: Callable[..., Path]) -> None:
    """PhiMoE's config has the settings, but names its experts otherwise than TRL asks for them since 1.8."""
    result = quiet(make(model_name_or_path=str(make_base("phimoe")), max_steps=1, r=4))
    assert len(result.losses) == 1


def test_two_runs_are_equal(make: Make, tmp_path: Path) -> None:
    runs = [quiet(make(output_dir=str(tmp_path / name))) for name in ("a", "b")]
    assert runs[0].losses == runs[1].losses
    weights = [(result.weights / "adapter_model.safetensors").read_bytes() for result in runs]
    assert weights[0] == weights[1]


def test_a_loss_that_is_no_number_halts_and_keeps_what_was_saved(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def compute_loss(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = stock(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 2 else loss

    stock = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    with pytest.raises(UserError, match=r"the loss is nan in step 3.*weights are not saved.*Lower learning_rate"):
        quiet(make(save_steps=1, max_steps=5))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"checkpoint-1", "checkpoint-2", "expertune_run.json", "recipe.yaml", "metrics.jsonl"}
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match="half-written"):
        quiet(make())


@pytest.mark.parametrize("held_out", [False, True])
def test_a_row_beyond_the_positions_is_refused_before_the_first_step(
    held_out: bool, make: Make, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    long_row = {"prompt": "1", "completion": "2" * 200}  # 202 tokens with the end; the model has 128 positions
    bad = str(write_rows([SUMS[0], long_row], name="long.jsonl"))
    names = ("dataset_name", "eval_dataset_name")
    fields = {names[held_out]: bad, names[not held_out]: str(write_rows(SUMS))}
    with pytest.raises(UserError, match=r"long\.jsonl, line 2: 202 tokens are beyond the 128.*Set max_length=128"):
        quiet(make(max_length=None, **fields))
    assert not (tmp_path / "out").exists()
    quiet(make(max_length=128, max_steps=1, **fields))


def test_truncated_answers_are_counted(make: Make, write_rows: Callable[..., Path]) -> None:
    data = str(write_rows([{"prompt": "1", "completion": "123456789"}, {"prompt": "1", "completion": "1"}]))
    output = StringIO()
    run(make(dataset_name=data, max_length=5), Console(file=output, width=200))
    assert "1 answers are cut off at max_length=5 (training)" in output.getvalue()


@pytest.mark.parametrize("kind", ["linear_attention", "conv"])
def test_packing_is_refused_where_samples_would_not_stay_apart(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def load(recipe: Recipe) -> Any:
        model, tokenizer = setup.load_model(recipe)
        model.config.layer_types = ["full_attention", kind]
        return model, tokenizer

    monkeypatch.setattr(run_module, "load_model", load)
    with pytest.raises(UserError, match=rf"packing lays samples .* layers of {kind}, .* Set packing=false"):
        quiet(make(packing=True, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", ["<eos>", ""])
def test_answers_that_end_with_nothing_are_told(make: Make, tmp_path: Path, stop: str) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}" + stop + "\n{% endfor %}")
    talk = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]}
    data = tmp_path / "talk.jsonl"
    data.write_text(f"{json.dumps(talk)}\n" * 4)
    output = StringIO()
    run(make(dataset_name=str(data), chat_template_path=str(template), max_steps=1), Console(file=output, width=200))
    assert ("no answer ends with '<eos>', so the model does not learn to stop" in output.getvalue()) is (stop == "")
