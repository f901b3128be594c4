"""The verbs as a user calls them: `load`, `explain`, `restore`, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

import expertune
from expertune import api
from tests.conftest import Checkpoint
from tests.families.found import family
from tests.families.tiny import tiny_model
from tests.hosts.adapters import lora, several_adapters, stock
from tests.hosts.models import CONFIGS, SHARED, batch, load_tiny, randomize, save_tiny, tokenizer
from tests.hosts.passes import assert_equal_within, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in bfloat16 with its tokenizer, as a user finds it on the hub."""
    path = save_tiny("qwen3_moe", tmp_path / "model")
    load_tiny(path, torch.bfloat16).save_pretrained(path)
    words = {f"<{i}>": i for i in range(SHARED["vocab_size"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<3>")), eos_token="<2>"
    ).save_pretrained(path)
    return path


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe_lite", "qwen2_moe", "gemma3_text"])
def test_what_is_drawn_next_is_what_would_have_been(checkpoint: Checkpoint, model_type: str) -> None:
    """So that a seed gives the adapters that it gives without us."""
    model = load_tiny(checkpoint(model_type))
    torch.manual_seed(42)
    expected = torch.rand(3)
    torch.manual_seed(42)
    expertune.optimize(model)
    assert torch.equal(torch.rand(3), expected)


SEES: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {
        "text_config": SHARED
        | {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 48,
            "out_hidden_size": 32,
        },
        "image_token_id": 60,
        "video_token_id": 61,
    },
    "llama4": {
        "text_config": CONFIGS["llama4_text"] | SHARED,
        "vision_config": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 128},
    },
}


def whole(name: str, folder: Path) -> PreTrainedModel:
    """A model that also sees, with a tokenizer, of a family that has a class for its language model alone, too."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {name}")
    config = CONFIG_MAPPING[name](**SEES[name])
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)
    tokenizer(64).save_pretrained(folder)
    return model


def test_load_takes_the_whole_of_a_model_that_sees(tmp_path: Path) -> None:
    """As stock and TRL do, so that adapters have the names that they look for."""
    host = whole("qwen3_5_moe", tmp_path / "model").eval()
    model, _ = expertune.load(str(tmp_path / "model"))
    model = expertune.add_lora(model, r=4, init_lora_weights=False).eval()
    model.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(host, tmp_path / "adapter").eval()
    ids = batch()["input_ids"]
    torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_load_says_where_it_takes_the_language_model_alone(tmp_path: Path) -> None:
    whole("llama4", tmp_path)
    with pytest.warns(UserWarning, match="the language model alone is loaded, without what sees"):
        model, _ = expertune.load(str(tmp_path))
    assert type(model).__name__ == "Llama4ForCausalLM"


def test_load(folder: Path) -> None:
    model, tokenizer = expertune.load(str(folder), max_seq_length=100)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.model_max_length == 100
    assert tokenizer("<7>")["input_ids"] == [7]
    assert "grouped_mm" in str(expertune.explain(model))
    assert model.is_gradient_checkpointing
    stock_model = load_tiny(folder, torch.float32).eval()
    model, _ = expertune.load(str(folder), dtype="float32", backend="native_torch", memory="fast")
    assert not model.is_gradient_checkpointing
    with torch.no_grad():
        logits, expected = model.eval()(**batch()).logits, stock_model(**batch()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_load_for_full_fine_tuning(folder: Path) -> None:
    model, _ = expertune.load(str(folder), dtype=torch.float64, full_finetuning=True, memory="lean")
    truth = run(load_tiny(folder), batch())
    assert_equal_within(run(model.train(), batch()), truth, 1e-12)


def test_load_an_adapter(folder: Path, tmp_path: Path) -> None:
    theirs = stock(folder, lora())
    theirs.save_pretrained(tmp_path / "adapter")
    model, tokenizer = expertune.load(str(tmp_path / "adapter"), dtype=torch.float64)
    assert isinstance(model, PeftModel)
    assert tokenizer("<7>")["input_ids"] == [7]
    assert_equal_within(run(model.train(), batch()), run(theirs, batch()), 1e-12)


def test_load_a_model_that_also_sees(tmp_path: Path) -> None:
    """Its own auto class is another one."""
    model = tiny_model(family("qwen3_vl_moe"))
    model.save_pretrained(tmp_path)
    tokenizer(SHARED["vocab_size"]).save_pretrained(tmp_path)
    loaded, _ = expertune.load(str(tmp_path), attn_implementation="eager")
    assert type(loaded) is type(model)
    assert "4 layers with experts" in str(expertune.explain(loaded))


def test_load_reads_config_and_tokenizer_from_where_the_weights_are(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "moved")
    model, read = expertune.load(str(tmp_path), subfolder="moved", local_files_only=True)
    assert model.config.model_type == "qwen3_moe"
    assert read("<7>")["input_ids"] == [7]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "4 bit": ({"load_in_4bit": True}, "load_in_4bit=True is not supported yet.*Load without it"),
    "too long": ({"max_seq_length": 129}, "beyond the 128 positions.*nearest that works is max_seq_length=128"),
    "no length": ({"max_seq_length": 0}, "max_seq_length must be at least 1, got 0"),
    "backend": ({"backend": "cuda"}, "unknown backend 'cuda'.*grouped_mm"),
    "backend that cannot run": ({"backend": "grouped_mm", "dtype": torch.float64}, "grouped_mm.*float64"),
    "memory": ({"memory": "little"}, "unknown memory 'little'"),
    "attention that is not installed": (
        {"attn_implementation": "flash_attention_3"},
        "attn_implementation='flash_attention_3' cannot run here: .*installed.*Drop attn_implementation",
    ),
    "attention that is unknown": (
        {"attn_implementation": "flush"},
        "attn_implementation='flush' cannot run here: .*not supported.*Drop attn_implementation",
    ),
}
_NEEDS_WEIGHTS = {"backend that cannot run"}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_load_refuses_in_words(folder: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        expertune.load(str(folder), **arguments)


@pytest.mark.parametrize("key", sorted(REFUSED.keys() - _NEEDS_WEIGHTS))
def test_load_refuses_before_the_weights_are_read(folder: Path, key: str) -> None:
    (folder / "model.safetensors").unlink()
    arguments, words = REFUSED[key]
    with pytest.raises(ValueError, match=words):
        expertune.load(str(folder), **arguments)


def test_load_keeps_an_attention_that_runs(folder: Path) -> None:
    model, _ = expertune.load(str(folder), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_what_is_wrong_besides_the_attention_is_told_by_the_host(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))  # generates no text
    with pytest.raises(ValueError, match="Unrecognized configuration class") as raised:
        expertune.load(str(folder), attn_implementation="flush")
    assert "Drop attn_implementation" not in str(raised.value)


def test_load_refuses_a_model_of_which_nothing_would_be_ours(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    tokenizer(SHARED["vocab_size"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="found no experts in Qwen3ForCausalLM"):
        expertune.load(str(tmp_path))


def test_load_refuses_an_adapter_that_it_cannot_honour(folder: Path, tmp_path: Path) -> None:
    stock(folder, lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter; full_finetuning=True needs a whole model"):
        expertune.load(str(tmp_path / "adapter"), full_finetuning=True)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"does not say which model it was trained on.*base_model_name_or_path"):
        expertune.load(str(tmp_path / "adapter"))


@pytest.mark.parametrize("verb", [expertune.optimize, expertune.restore, expertune.explain, expertune.add_lora])
def test_what_is_no_transformers_model_is_refused(verb: Any) -> None:
    with pytest.raises(ValueError, match="expected a Transformers or PEFT model, got Linear"):
        verb(nn.Linear(2, 2))


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        expertune.fit  # noqa: B018
    assert all(callable(getattr(expertune, name)) for name in expertune.__all__)


def test_explain_tells_backend_weights_adapters_and_what_was_passed_over(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("qwen3_moe"))
    assert str(expertune.explain(model)).startswith("not optimized")
    text = str(expertune.explain(expertune.optimize(model))).splitlines()
    assert text[0] == "2 layers with experts, backend asked for: auto"
    assert text[1] == (
        "model.layers.0.mlp.experts: native_torch · 8 experts 32→24, (E, O, I), torch.float64 · gate silu"
    )
    assert text[2] == "    adapter  none"
    assert "    passed over  grouped_mm: needs bfloat16, float16 or float32, got torch.float64" in text


@several_adapters
def test_explain_tells_the_active_adapter(checkpoint: Checkpoint) -> None:
    adapted = expertune.add_lora(load_tiny(checkpoint("qwen3_moe")), r=3)
    adapted.add_adapter("other", lora(r=2, target_parameters=adapted.peft_config["default"].target_parameters))
    text = str(expertune.explain(adapted)).splitlines()
    assert "    adapter  down_proj: default (r=3)" in text
    assert "    adapter  gate_up_proj: default (r=3)" in text
    adapted.set_adapter("other")
    assert "    adapter  gate_up_proj: other (r=2)" in str(expertune.explain(adapted)).splitlines()
    assert str(expertune.explain(expertune.restore(adapted))).startswith("not optimized")


def test_explain_after_the_model_moved_to_another_dtype(checkpoint: Checkpoint, walks: list[str]) -> None:
    """The backend is chosen for the weights as they are, also when they are cast later."""
    model = expertune.optimize(load_tiny(checkpoint("gpt_oss")))
    model.to(torch.bfloat16)(**batch())
    assert "layers.0.mlp.experts: grouped_mm · 8 experts 32→24, (E, I, O), torch.bfloat16 · gate clamped silu" in str(
        expertune.explain(model)
    )
    assert set(walks) == {"grouped_mm"}


def test_adapters_that_cannot_be_honoured_leave_the_model_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = expertune.load(str(folder), dtype=torch.float32)

    def refuse(*_: Any) -> None:
        raise ValueError("not so")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not so"):
        patch.setattr(api, "_check_adapted", refuse)
        expertune.add_lora(model, r=2)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert any("lora_A" in name for name, _ in expertune.add_lora(model, r=2).named_parameters())
