"""The command line, and everything that a user can get wrong: one paragraph, exit code 1, and no file touched."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from expertune.cli import app
from expertune.training import run as run_module
from expertune.training.output import OutputFolder
from expertune.training.recipe import Recipe
from tests.training.conftest import CHAT, SUMS, UNMARKED, make_tokenizer


class Desk:
    """A folder of a user, with a recipe in it."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder = folder
        self.recipe = recipe

    def train(self, *overrides: str, **fields: Any) -> Result:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe | fields))
        return CliRunner().invoke(app, ["train", str(path), *overrides])

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text, encoding="utf-8")
        return str(self.folder / name)

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def refuses(self, *words: str, **fields: Any) -> None:
        """Training with these fields fails with one paragraph that has these words in it, and changes no file."""
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe | fields))
        before = self.files()
        result = self.train(**fields)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.output
        for word in words:
            assert word in result.stderr
        assert self.files() == before


@pytest.fixture
def desk(tmp_path: Path, make_base: Callable[..., Path], write_rows: Callable[..., Path]) -> Desk:
    recipe = {
        "model_name_or_path": str(make_base()),
        "dtype": "float32",
        "dataset_name": str(write_rows(SUMS)),
        "max_steps": 2,
        "max_length": 64,
        "output_dir": str(tmp_path / "out"),
    }
    return Desk(tmp_path, recipe)


def test_trains(desk: Desk) -> None:
    result = desk.train("r=4", "eval_size=4")
    assert result.exit_code == 0, result.output
    assert "Trained:" in result.output
    assert "step 2/2  held-out loss" in result.output
    assert result.output.replace("\n", "").isprintable()
    assert json.loads((desk.folder / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_a_model_without_experts(desk: Desk, make_base: Callable[..., Path]) -> None:
    dense = str(make_base("qwen3"))
    desk.refuses("found no experts in Qwen3ForCausalLM", "Train it with PEFT and TRL", model_name_or_path=dense)
    assert not (desk.folder / "out").exists()


def test_weights_that_this_run_reads_are_not_overwritten(desk: Desk) -> None:
    """As told when memory ran out: "the weights in out/checkpoint-1 stand; to go on from them, set …"."""
    assert desk.train("r=4", "save_steps=1").exit_code == 0
    checkpoint = desk.folder / "out" / "checkpoint-1"
    again = {"model_name_or_path": str(checkpoint), "overwrite_output_dir": True}
    desk.refuses("this run reads model_name_or_path", "Choose another output_dir", **again)
    assert (checkpoint / "adapter_config.json").is_file()


def test_a_recipe_may_have_an_equals_sign_in_its_path(desk: Desk) -> None:
    path = desk.folder / "lr=1" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(desk.recipe))
    result = CliRunner().invoke(app, ["train", str(path), "max_steps=0"])
    assert "max_steps" in result.output
    assert "unknown key" not in result.output


def test_unknown_key(desk: Desk) -> None:
    desk.refuses("unknown key 'learning_rat'", "did you mean 'learning_rate'?", learning_rat=3)


def test_missing_files(desk: Desk) -> None:
    result = CliRunner().invoke(app, ["train", str(desk.folder / "no.yaml")])
    assert (result.exit_code, "there is no recipe" in result.stderr) == (1, True)
    desk.refuses("there is no data at 'no.jsonl'", "Check the path", dataset_name="no.jsonl")
    desk.refuses("there is no data at './no'", eval_dataset_name="./no")
    desk.refuses("model_name_or_path './no' (there is no such folder in ", model_name_or_path="./no")
    desk.refuses("chat_template_path './no'", chat_template_path="./no")
    (desk.folder / "latin").write_bytes("Größe".encode("latin-1"))
    desk.refuses("cannot be read as text in UTF-8", chat_template_path=str(desk.folder / "latin"))


def test_broken_json_line(desk: Desk) -> None:
    data = desk.write("broken.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion\n')
    desk.refuses(f"{data}, line 2 is not JSON: Unterminated string", "Mend or remove it", dataset_name=data)


@pytest.mark.parametrize("row", ['{"prompt": "a"}', '{"prompt": "a", "completion": ""}'])
def test_row_without_an_answer(row: str, desk: Desk) -> None:
    data = desk.write("data.jsonl", '{"prompt": "a", "completion": "b"}\n' + row)
    desk.refuses(f"{data}, line 2: field 'completion' is ", "Mend or remove the row", dataset_name=data)


def test_columns_of_no_shape(desk: Desk) -> None:
    data = desk.write("data.jsonl", '{"question": "a", "answer": "b"}')
    desk.refuses("columns question, answer, which fit none", "columns={question: prompt", dataset_name=data)


def test_all_labels_masked(desk: Desk, make_base: Callable[..., Path]) -> None:
    data = desk.write("data.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "abcdefgh", "completion": "i"}\n')
    desk.refuses(
        f"{data}, line 2: the prompt alone fills max_length=8", "Raise max_length", dataset_name=data, max_length=8
    )
    talk = desk.write("talk.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}')
    unmarked = str(make_base(chat_template=UNMARKED))
    desk.refuses("does not mark what the assistant says", dataset_name=talk, model_name_or_path=unmarked)
    desk.refuses("no chat template", dataset_name=talk)
    nothing = CHAT.replace("{% generation %}", "{% if false %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endif %}"
    )
    template = desk.write("nothing.jinja", nothing)
    desk.refuses(f"{talk}, line 1: no token to learn from", dataset_name=talk, chat_template_path=template)


ASKED, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RULE = {"role": "system", "content": "r"}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("columns", ["messages", "prompt and completion"])
def test_a_row_that_the_chat_template_does_not_take(desk: Desk, columns: str, held_out: bool) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHAT
    if columns == "messages":
        good, bad = {"messages": [ASKED, ANSWER]}, {"messages": [RULE, ASKED, ANSWER]}
    else:
        good, bad = {"prompt": [ASKED], "completion": [ANSWER]}, {"prompt": [RULE, ASKED], "completion": [ANSWER]}
    data = {
        "dataset_name": desk.write("good.jsonl", json.dumps(good)),
        "eval_dataset_name": desk.write("also_good.jsonl", json.dumps(good)),
    }
    data[list(data)[held_out]] = desk.write("talk.jsonl", f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    words = "talk.jsonl, line 2: the chat template does not take this row: no system here. Mend or remove the row"
    desk.refuses(words, **data, chat_template_path=desk.write("strict.jinja", strict))
    assert not (desk.folder / "out").exists()


@pytest.mark.parametrize("tools", ["search(query)", 3, {"name": "f"}, '{"name": "f"}', ["f"]])
@pytest.mark.parametrize("shape", ["messages", "sharegpt"])
def test_tools_that_are_no_list_of_schemas(desk: Desk, make_base: Callable[..., Path], shape: str, tools: Any) -> None:
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    talk = {"messages": [ASKED, ANSWER]} if shape == "messages" else {"conversations": shared}
    rows = [talk | {"tools": "[]"}, talk | {"tools": tools}]
    data = desk.write("talk.jsonl", "\n".join(json.dumps(row) for row in rows))
    model = str(make_base(chat_template=CHAT))
    words = (f"{data}, line 2: field 'tools' holds ", "expected a list of the tools' JSON schemas. Mend or remove")
    desk.refuses(*words, dataset_name=data, model_name_or_path=model)


def test_a_tokenizer_of_another_model(desk: Desk, make_base: Callable[..., Path]) -> None:
    model = shutil.copytree(make_base(), desk.folder / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(50)])
    tokenizer.save_pretrained(model)
    data = desk.write("data.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "<49>", "completion": "b"}\n')
    words = f"{data}, line 2: token 308, '<49>', is beyond the 272 that the model knows"
    desk.refuses(words, dataset_name=data, model_name_or_path=str(model))


def test_target_that_matches_nothing(desk: Desk) -> None:
    desk.refuses("target_modules ['qproj'] match nothing", "It has ", target_modules=["qproj"])
    desk.refuses("names 'gate_proj' without 'up_proj'", target_modules=["gate_proj"])


def test_backend(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.refuses("unknown moe_backend 'cuda'", "grouped_mm", moe_backend="cuda")
    monkeypatch.setenv("EXPERTUNE_MOE_BACKEND", "cuda")
    desk.refuses("unknown EXPERTUNE_MOE_BACKEND 'cuda'")
    monkeypatch.delenv("EXPERTUNE_MOE_BACKEND")
    desk.refuses("backend 'grouped_mm' cannot run here", "Choose another", moe_backend="grouped_mm", dtype="auto")


def test_what_experts_cannot_do(desk: Desk) -> None:
    desk.refuses("lora_dropout=0.1 cannot be used on experts", "target the attention alone", lora_dropout=0.1)
    desk.refuses("use_dora=True cannot be used on experts", use_dora=True)
    desk.refuses("load_in_4bit=True is not supported", load_in_4bit=True)
    desk.refuses("max_seq_length=1000 is beyond the 128 positions", max_length=1000)


def test_an_adapter_of_another_layout(desk: Desk) -> None:
    assert desk.train(r=4).exit_code == 0
    adapter = desk.folder / "out" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.18.1"}))
    fields = {"model_name_or_path": str(adapter), "output_dir": str(desk.folder / "second")}
    desk.refuses("was written by PEFT 0.18.1", "train it again", **fields)
    tensors = load_file(adapter / "adapter_model.safetensors")
    swapped = {key: _swap(tensors, key) if ".experts." in key else value for key, value in tensors.items()}
    save_file(swapped, adapter / "adapter_model.safetensors")
    desk.refuses("was written by PEFT 0.18.1", **fields)


def _swap(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    other = key.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")
    return tensors[other].T.contiguous()


def test_output_folders(desk: Desk) -> None:
    desk.refuses("cannot be written", "is a file. Choose another", output_dir=str(desk.folder / "recipe.yaml" / "out"))
    out = desk.folder / "out"
    out.mkdir()
    desk.write("out/thesis.tex", "mine")
    desk.refuses("holds files that expertune did not write", "Choose a new or empty folder")
    desk.refuses("holds files that expertune did not write", overwrite_output_dir=True)
    (out / "thesis.tex").unlink()

    OutputFolder(out, overwrite=False).claim()  # a run that was killed
    desk.refuses("holds a half-written run", "overwrite_output_dir=true")
    assert desk.train("overwrite_output_dir=true").exit_code == 0
    desk.refuses("holds a finished run")
    # an earlier result outlives a run that cannot begin
    desk.refuses("match nothing", overwrite_output_dir=True, target_modules=["qproj"])


def test_a_balance_loss_that_the_model_has_not(desk: Desk, make_base: Callable[..., Path]) -> None:
    without = str(make_base("deepseek_v3"))
    desk.refuses("deepseek_v3 has no balance loss", model_name_or_path=without, router_aux_loss_coef=0.1)


def test_other_names_that_do_not_exist(desk: Desk) -> None:
    desk.refuses("report_to 'wandbb' is not installed here, or not known", report_to="wandbb")
    desk.refuses("lr_scheduler_type: input should be 'linear'", lr_scheduler_type="line")


def test_usage(desk: Desk) -> None:
    result = desk.train("r", "4")
    assert result.exit_code == 2
    assert "'r' is neither the recipe, which comes first, nor key=value" in " ".join(result.stderr.split())


def test_a_bug_keeps_its_traceback(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_recipe: object, **_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(run_module, "run", broken)
    result = desk.train()
    assert isinstance(result.exception, ValueError)


def test_the_keys_of_a_recipe_are_listed_with_what_they_say() -> None:
    result = CliRunner().invoke(app, ["train", "--keys"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    listed = [line.split()[0] for line in result.output.splitlines() if not line.startswith(" ")]
    assert listed == list(Recipe.model_fields)
    assert re.search(r'^memory +"auto" +What is kept from forward to backward', result.output, re.MULTILINE)
    assert re.search(r"^dataset_name +needed +The data: a JSONL", result.output, re.MULTILINE)
    assert all(field.description for field in Recipe.model_fields.values())


def test_without_the_packages_of_the_command_line_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from expertune.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "error: the command line needs more: pip install 'expertune[train]'"


def test_the_real_program(desk: Desk) -> None:
    code = "from expertune.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "dataset_name=no.jsonl", "model_name_or_path=x", "output_dir=out"]
    result = subprocess.run(
        command, cwd=desk.folder, env=os.environ | {"COLUMNS": "60"}, capture_output=True, text=True
    )
    assert result.returncode == 1
    *before, last = result.stderr.splitlines()
    assert last.startswith("error: there is no data at 'no.jsonl'")
    assert all("gemm_4bit_forward" in line for line in before), "what bitsandbytes says when it is imported"


def test_an_unknown_optimizer(desk: Desk) -> None:
    desk.refuses("unknown optim 'adam'", "adamw_torch, adamw_8bit or another", optim="adam")


def test_what_a_failed_run_was_to_replace_is_told_and_kept(desk: Desk) -> None:
    assert desk.train().exit_code == 0
    out = Path(desk.recipe["output_dir"])
    adapter = {path.name: path.read_bytes() for path in (out / "adapter").iterdir()}
    failed = desk.train("overwrite_output_dir=true", "learning_rate=1e30")
    assert failed.exit_code == 1
    assert f"the earlier run was not replaced; it lies in {out / 'earlier-run-1'}" in " ".join(failed.output.split())
    assert {path.name: path.read_bytes() for path in (out / "earlier-run-1" / "adapter").iterdir()} == adapter


def test_the_recipe_that_is_read_is_not_overwritten(desk: Desk) -> None:
    assert desk.train().exit_code == 0
    recipe = Path(desk.recipe["output_dir"]) / "recipe.yaml"
    with recipe.open("a") as file:
        file.write("# notes of mine\n")
    result = CliRunner().invoke(app, ["train", str(recipe), "overwrite_output_dir=true"])
    assert (result.exit_code, "this run reads recipe=" in result.stderr) == (1, True)
    assert recipe.read_text().endswith("# notes of mine\n")
