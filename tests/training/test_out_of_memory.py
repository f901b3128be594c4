"""Out of memory or disk in a run: what is told, and that nothing that was written is lost."""

import errno
import json
import os
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import expertune
from expertune.training import fits, out_of_memory
from expertune.training import run as run_module
from expertune.training.callbacks import Trainer
from expertune.training.errors import UserError
from expertune.training.fits import GIB
from expertune.training.out_of_memory import Held, settings, told_disk_full
from expertune.training.recipe import Recipe
from expertune.training.recipe_file import load_recipe
from expertune.training.run import run

Make = Callable[..., Recipe]


@pytest.fixture
def runs_out(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`runs_out(step=3)`: in the backward pass of that step, or in the evaluation after `after` steps; at 2 GiB."""

    def patch(step: int = -1, after: int = -1) -> None:
        def training_step(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = train(self, *args, **kwargs)
            if self.state.global_step == step - 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss

        def prediction_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == after:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return predict(self, *args, **kwargs)

        train, predict = Trainer.training_step, Trainer.prediction_step
        monkeypatch.setattr(Trainer, "training_step", training_step)
        monkeypatch.setattr(Trainer, "prediction_step", prediction_step)
        monkeypatch.setattr(out_of_memory, "peak_gib", lambda: 2.0)

    return patch


def failed(recipe: Recipe) -> str:
    with pytest.raises(UserError) as raised:
        run(recipe, Console(file=StringIO()))
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    return str(raised.value)


def test_step_peak_parts_settings_and_checkpoint_are_told(
    make: Make, runs_out: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fits, "GIB", 2**20)  # so that the parts of a tiny model can be read
    runs_out(step=3)
    told = failed(make(save_steps=1, max_steps=5, r=64))
    # 167,936 of 229,056 numbers are trained, all in float32
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert told == (
        "out of GPU memory in step 3. At the peak 2048.00 GiB were held: base weights 0.23, trained weights 0.64, "
        "gradients 0.64, optimizer state 1.28, activations and the rest 2045.20. What helps here, the best first: "
        "memory=lean; per_device_train_batch_size=1 gradient_accumulation_steps=2; optim=adamw_8bit. "
        f"The weights in {checkpoint} stand; to go on from them, set model_name_or_path={checkpoint} and another "
        "output_dir."
    )


def test_nothing_that_was_written_is_lost(make: Make, runs_out: Callable[..., None], tmp_path: Path) -> None:
    runs_out(step=3)
    recipe = make(save_steps=1, max_steps=5)
    failed(recipe)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"checkpoint-1", "checkpoint-2", "expertune_run.json", "recipe.yaml", "metrics.jsonl"}
    assert load_recipe(out / "recipe.yaml") == recipe
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    with pytest.raises(UserError, match="half-written"):
        run(recipe)
    on = make(model_name_or_path=str(out / "checkpoint-2"), max_steps=1, output_dir=str(tmp_path / "on"))
    assert run(on, Console(file=StringIO())).losses


def test_before_the_first_save_the_way_to_have_one_is_told(make: Make, runs_out: Callable[..., None]) -> None:
    runs_out(step=1)
    assert failed(make()).endswith("No weights were saved yet; save_steps saves them on the way.")


@pytest.mark.parametrize(("after", "saved"), [(0, None), (2, "checkpoint-2"), (3, "adapter")])
def test_an_evaluation_that_does_not_fit_costs_no_weights(
    after: int, saved: str | None, make: Make, runs_out: Callable[..., None], tmp_path: Path
) -> None:
    runs_out(after=after)
    told = failed(make(eval_size=4, eval_steps=2 if after == 2 else None, save_steps=2))
    assert told.startswith(f"out of GPU memory in the evaluation after step {after}.")
    assert "memory=lean" not in told
    if saved is not None:
        assert f"The weights in {tmp_path / 'out' / saved} stand" in told
        assert (tmp_path / "out" / saved / "adapter_model.safetensors").is_file()


def recipe_of(**fields: Any) -> Recipe:
    return Recipe(**{"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"} | fields)


def held(*, weights: int = 1, rest: int = 10) -> Held:
    return Held(base=GIB, trained=weights, gradients=weights, optimizer=2 * weights, peak=GIB + 4 * weights + rest)


BATCH = "per_device_train_batch_size=1 gradient_accumulation_steps=8"
HELPFUL: dict[str, tuple[dict[str, Any], Held, int, list[str]]] = {
    "activations": ({}, held(), 4000, ["memory=lean", BATCH, "max_length=1792"]),
    "lean already": ({"memory": "lean"}, held(), 600, [BATCH, "max_length=256", "optim=adamw_8bit"]),
    "weights": ({}, held(weights=10), 4000, ["optim=adamw_8bit", "r=8", "memory=lean"]),
    "all weights": (
        {"finetuning_type": "full", "optim": "adamw_8bit", "dtype": "float32"},
        held(weights=10),
        4000,
        ["finetuning_type=lora", "dtype=bfloat16", "memory=lean"],
    ),
    "little left to do": (
        {"memory": "lean", "per_device_train_batch_size": 1, "optim": "adamw_8bit", "r": 1},
        held(),
        256,
        ["a card with more memory"],
    ),
}


@pytest.mark.parametrize(("fields", "when", "longest", "expected"), HELPFUL.values(), ids=HELPFUL)
def test_what_helps_goes_by_what_is_held(fields: dict[str, Any], when: Held, longest: int, expected: list[str]) -> None:
    assert settings(recipe_of(**fields), when, longest, can_be_lean=True) == expected


def test_lean_is_left_out_where_it_would_do_nothing() -> None:
    assert "memory=lean" not in settings(recipe_of(), held(), 4000, can_be_lean=False)


def test_the_rank_of_an_adapter_that_is_trained_further_stays(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}')
    recipe = recipe_of(model_name_or_path=str(tmp_path))
    assert "r=8" not in settings(recipe, held(weights=10), 4000, can_be_lean=True)


def test_adapters_that_do_not_fit_are_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_lora(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(expertune, "add_lora", add_lora)
    assert re.search(r"adapters do not fit .* Lower r, set autocast_adapter_dtype=false, or", failed(make()))


def test_weights_that_do_not_fit_are_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(expertune, "load", load)
    told = failed(make())
    assert "its weights alone do not fit the GPU. CUDA out of memory. Tried to allocate 2.00 GiB." in told
    assert told.endswith("Take a smaller model or a larger card, or set dtype=bfloat16.")


@pytest.mark.parametrize(("save_steps", "saved"), [(1, "checkpoint-1"), (2, None)])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_full_disk_is_told_with_what_was_saved(
    method: str, save_steps: int, saved: str | None, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_at_the_second_step(trainer: Trainer, path: Path) -> None:
        if trainer.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # bytes of a file, so no weights
        try:
            save(trainer, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    save = run_module._save
    monkeypatch.setattr(run_module, "_save", full_at_the_second_step)
    with pytest.raises(UserError, match=r"can be written no more: .*Make room on the disk") as raised:
        run(make(save_steps=save_steps, finetuning_type=method), Console(file=StringIO()))
    if saved is None:
        assert "No weights were saved yet" in str(raised.value)
    else:
        assert f"The weights in {tmp_path / 'out' / saved} stand" in str(raised.value)
        assert any((tmp_path / "out" / saved).glob("*.safetensors"))


def test_a_disk_that_is_full_when_all_is_saved_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def plot_losses(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_module, "plot_losses", plot_losses)
    with pytest.raises(UserError, match=f"The weights in {tmp_path / 'out' / 'adapter'} stand"):
        run(make(max_steps=1), Console(file=StringIO()))


def test_only_the_disk_is_blamed_on_the_disk(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match=r"No space left on device\. Make room"), told_disk_full(tmp_path, []):
        raise full
    with pytest.raises(ConnectionError), told_disk_full(tmp_path, []):
        raise ConnectionError("a tracker that cannot be reached")
