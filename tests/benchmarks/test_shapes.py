"""A checkpoint that is written part by part is the one that the host writes at once."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shapes import SHAPES, model_config, write_model

NARROW = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_loads_whole_and_is_drawn_as_the_host_draws(shape: str, tmp_path: Path) -> None:
    widths = {name: width for name, width in NARROW.items() if name in SHAPES[shape][1]}
    write_model(shape, 6, tmp_path, **widths)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    drawn = AutoModelForCausalLM.from_config(model_config(shape, 6, **widths), dtype=torch.bfloat16).state_dict()
    assert loaded.state_dict().keys() == drawn.keys()
    for name, ours in loaded.state_dict().items():
        theirs = drawn[name]
        if name.endswith("e_score_correction_bias"):  # which Transformers 5.20 loads in float32
            ours = ours.to(theirs.dtype)
        assert ours.dtype == theirs.dtype
        if theirs.unique().numel() == 1:
            assert torch.equal(ours, theirs), name
        elif theirs.numel() >= 256:
            assert ours.float().std().item() == pytest.approx(theirs.float().std().item(), rel=0.2), name
            assert not torch.equal(ours, theirs)
    layers = [x for name, x in loaded.state_dict().items() if name.endswith("self_attn.o_proj.weight")]
    assert len(layers) == 6
    assert not torch.equal(layers[0], layers[1])
