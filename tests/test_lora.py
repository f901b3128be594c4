"""Packing against PEFT's own delta weight, and unpacking against packing's transpose."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from expertune import lora
from expertune.shapes import LoraFactors

E, I, O = 5, 6, 7  # noqa: E741


class _Experts(nn.Module):
    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(E, O, I, dtype=torch.float64))


def _peft_adapter(rank: int, alpha: float) -> tuple[LoraFactors, torch.Tensor]:
    wrapper = ParamWrapper(
        _Experts(), "default", "gate_up_proj", config=LoraConfig(r=rank, lora_alpha=alpha), r=rank, lora_alpha=alpha
    )
    a, b = wrapper.lora_A["default"].weight.data, wrapper.lora_B["default"].weight.data
    b.normal_()
    return LoraFactors(a=a, b=b, scale=wrapper.scaling["default"]), wrapper.get_delta_weight("default")


@pytest.mark.parametrize("ranks", [(1,), (8,), (3, 4), (16, 1, 2)], ids=str)
def test_packed_factors_multiply_to_pefts_delta(ranks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    adapters, deltas = zip(*(_peft_adapter(rank, 2.5 * rank) for rank in ranks), strict=True)
    a_ERI, b_EOR = lora.pack(adapters, E, torch.float64)
    assert a_ERI.shape[1] == b_EOR.shape[2] == lora.joined_rank(adapters, E)
    assert a_ERI.shape[1] % lora.RANK_MULTIPLE == 0
    torch.testing.assert_close(b_EOR @ a_ERI, sum(deltas), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("ranks", [(1,), (8,), (3, 4)], ids=str)
def test_unpacking_gradients_is_the_adjoint_of_packing(ranks: tuple[int, ...]) -> None:
    """`⟨unpack(d), f⟩ = ⟨d, pack(f)⟩` for every `d` is what makes it the gradient, as packing is linear."""
    torch.manual_seed(0)
    adapters = [
        LoraFactors(
            a=torch.randn(E * rank, I, dtype=torch.float64),
            b=torch.randn(O, rank * E, dtype=torch.float64),
            scale=1.0 + i,
        )
        for i, rank in enumerate(ranks)
    ]
    a_ERI, b_EOR = lora.pack(adapters, E, torch.float64)
    da_ERI, db_EOR = torch.randn_like(a_ERI), torch.randn_like(b_EOR)
    for i, adapter in enumerate(adapters):
        only = [
            LoraFactors(
                a=other.a if i == j else torch.zeros_like(other.a),
                b=other.b if i == j else torch.zeros_like(other.b),
                scale=other.scale,
            )
            for j, other in enumerate(adapters)
        ]
        packed_a, packed_b = lora.pack(only, E, torch.float64)
        da, db = lora.unpack_a_grads(da_ERI, adapters)[i], lora.unpack_b_grads(db_EOR, adapters)[i]
        assert da.shape == adapter.a.shape
        assert db.shape == adapter.b.shape
        torch.testing.assert_close((da * adapter.a).sum(), (da_ERI * packed_a).sum(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((db * adapter.b).sum(), (db_EOR * packed_b).sum(), rtol=1e-12, atol=1e-12)


def test_gradients_keep_the_dtype_of_their_factor() -> None:
    factors = LoraFactors(a=torch.randn(E * 8, I), b=torch.randn(O, 8 * E), scale=0.5)
    a_ERI, b_EOR = lora.pack([factors], E, torch.bfloat16)
    assert a_ERI.dtype == b_EOR.dtype == torch.bfloat16
    assert lora.unpack_a_grads(a_ERI, [factors])[0].dtype == torch.float32
    assert lora.unpack_b_grads(b_EOR, [factors])[0].dtype == torch.float32
