"""Torch's fused kernels behind our attention, in the dtypes people train in: no worse than the formula in them."""

import pytest
import torch

from expertune.attention import attend as attending
from expertune.attention.attend import attend
from expertune.attention.sequences import Sequences
from tests.attention.chosen import kernels_chosen
from tests.attention.test_attend import causal, gradients, inputs, same, written_out
from tests.cases import needs_cuda

pytestmark = needs_cuda

T = 333


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that attended."""
    return kernels_chosen(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128, 192, 256])
@pytest.mark.parametrize("case", ["full", "window", "packed", "padded", "narrow values", "no sinks", "tiles"])
def test_a_kernel_is_no_worse_than_the_formula(
    case: str, width: int, dtype: torch.dtype, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    window = None if case in ("full", "narrow values") else 40
    is_ours_alone = case not in ("narrow values", "tiles")
    length = 1700 if is_ours_alone else T  # enough blocks of keys for our own kernel
    if case == "tiles":
        monkeypatch.setattr(attending, "PREFERRED", attending.PREFERRED[-1:])
    of_values = width // 2 if case == "narrow values" else {192: 128}.get(width, width)
    tensors = inputs(h=8, j=2, t=length, d=width, values=of_values, dtype=dtype, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in tensors]
    sequences, mask_BTS = None, causal(length, window, "cuda")
    if case == "packed":
        position_BT = torch.cat([torch.arange(n) for n in (100, 1, length - 101)]).cuda().expand(2, length)
        sequences = Sequences.of_positions(position_BT)
        mask_BTS = mask_BTS & same((position_BT == 0).cumsum(-1))
    elif case == "padded":
        is_token_BT = torch.arange(length, device="cuda") >= torch.tensor([[0], [77]], device="cuda")
        sequences = Sequences.of_padding(is_token_BT)
        mask_BTS = mask_BTS & is_token_BT[:, None] & is_token_BT[:, :, None]
    num_used = 3 if case == "no sinks" else 4
    scale = width**-0.5

    def results(of: list[torch.Tensor], is_ours: bool) -> list[torch.Tensor]:
        sinks = of[3] if num_used == 4 else None
        out = (
            attend(*of[:3], scale=scale, window=window, sinks_H=sinks, sequences=sequences)
            if is_ours
            else written_out(*of[:3], sinks, mask_BTS, scale)
        )
        return [out, *gradients(out, of[:num_used])]

    ours, plain, truth = results(tensors, True), results(tensors, False), results(exact, False)
    fast = "cudnn" if torch.cuda.get_device_capability() >= (9, 0) else "flash"
    if is_ours_alone and torch.cuda.get_device_capability()[0] == 9:
        expected = "hopper"
    else:
        expected = {"full": fast, "narrow values": fast, "tiles": "tiles"}.get(case, "flash")
    assert ran == [expected]
    for number, (got, other, true) in enumerate(zip(ours, plain, truth, strict=True)):
        assert got.shape == true.shape
        # the share of the sinks rounds once more; their own gradient is one number a head, rounded at the end
        slack = torch.finfo(dtype).eps / 4 * true.norm() if number == 4 else 0
        assert (got.double() - true).norm() <= 1.2 * (other.double() - true).norm() + slack


@pytest.mark.parametrize("window", [None, 40])
def test_sinks_have_their_gradient_where_that_of_the_output_is_one_number(window: int | None) -> None:
    """As that of a sum, which has no strides."""
    tensors = inputs(h=8, j=2, t=T, d=64, dtype=torch.bfloat16, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in tensors]
    attend(*tensors[:3], scale=0.125, window=window, sinks_H=tensors[3]).sum().backward()
    written_out(*exact, causal(T, window, "cuda"), 0.125).sum().backward()
    torch.testing.assert_close(tensors[3].grad.double(), exact[3].grad, rtol=0.02, atol=0.02 * exact[3].grad.norm())


def test_a_long_context_takes_memory_in_proportion() -> None:
    peaks = []
    for length in (4096, 8192):
        tensors = inputs(b=1, h=8, j=1, t=length, d=64, dtype=torch.bfloat16, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(*tensors[:3], scale=0.125, window=128, sinks_H=tensors[3]).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.1 * peaks[0]
