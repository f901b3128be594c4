"""What is known of a family from its config alone, as `expertune tune` and `load` see it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from expertune.hosts.classes import auto_class
from expertune.hosts.layouts import outline
from expertune.hosts.transformers import layout_of, named_experts
from tests.families.found import Family, families
from tests.families.tiny import tiny_config

GENERATING = [family for family in families().values() if family.auto is not AutoModel]
ONE_EXPERT = {"zaya"}


@pytest.mark.parametrize("family", GENERATING, ids=[family.name for family in GENERATING])
def test_the_experts_of_every_family_that_generates(family: Family, tmp_path: Path) -> None:
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        whole = family.auto.from_config(config)
    found = outline(str(tmp_path))
    assert set(found.layouts) == {layout_of(experts) for _, experts in named_experts(whole)}
    assert found.top_k == (1 if family.name in ONE_EXPERT else 2)
    with torch.device("meta"):
        assert type(auto_class(config).from_config(config)) is type(whole)
