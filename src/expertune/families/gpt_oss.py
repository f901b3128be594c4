"""gpt-oss: gate and up lie interleaved, the gate is clamped and shifted. Source: GptOssExperts, transformers 5.23."""

from typing import cast

from torch import nn

from expertune.activations import ClampedSwiGlu, Gate
from expertune.families.family import Family


def _clamped_swiglu(experts: nn.Module) -> Gate:
    return ClampedSwiGlu(alpha=cast(float, experts.alpha), limit=cast(float, experts.limit), is_concatenated=False)


FAMILY = Family(model_types=("gpt_oss",), fused_gate=_clamped_swiglu)
