"""Stock packed samples that do not see each other."""

import torch
from transformers import AutoModelForCausalLM

from apart import keep_samples_apart
from shapes import model_config

_SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "head_dim": 16}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 5}
_LENGTHS = (11, 3, 7)


def test_packed_samples_of_gpt_oss_give_what_each_gives_alone() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        model_config("gptoss", 2, **_SMALL, **_HEADS), experts_implementation="eager"
    )
    model = model.double()
    ids = torch.randint(64, (1, sum(_LENGTHS)))
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
    alone = torch.cat([model(each).logits for each in ids.split(_LENGTHS, 1)], 1)
    packed = {"position_ids": positions, "use_cache": False}
    assert not torch.allclose(model(ids, **packed).logits, alone, atol=1e-3), "the host keeps them apart by now"
    keep_samples_apart(model.model)
    torch.testing.assert_close(model(ids, **packed).logits, alone)
