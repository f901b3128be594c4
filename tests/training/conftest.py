"""Tiny checkpoints with a tokenizer, and recipes on them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from expertune.training.recipe import Recipe
from expertune.training.recipe_file import make_recipe
from tests.hosts.models import save_tiny

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
UNMARKED = CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERTUNE_MOE_BACKEND", raising=False)


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A token a byte."""
    vocabulary = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=chat_template
    )


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_base("qwen3_moe", chat_template=CHAT)` is the folder of such a model, made once."""
    made: dict[tuple[str, str | None], Path] = {}

    def make(model_type: str = "qwen3_moe", chat_template: str | None = None) -> Path:
        key = (model_type, chat_template)
        if key not in made:
            made[key] = save_tiny(model_type, tmp_path_factory.mktemp(model_type), vocab_size=272)
            make_tokenizer(chat_template).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Sequence[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(4)]


@pytest.fixture
def make(make_base: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """`make(r=4)` is a small recipe with these fields besides."""

    def recipe(**fields: Any) -> Recipe:
        values: dict[str, Any] = {
            "model_name_or_path": str(make_base()),
            "dtype": "float32",
            "max_steps": 3,
            "logging_steps": 1,
            "gradient_accumulation_steps": 1,
            "output_dir": str(tmp_path / "out"),
            "max_length": 100,
        } | fields
        if "dataset_name" not in values:
            values["dataset_name"] = str(write_rows(SUMS))
        return make_recipe(values)

    return recipe
