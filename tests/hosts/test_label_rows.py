"""The rows of labels, counted ahead: the same numbers and gradients as by torch's masks, and nobody asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import expertune
from expertune.hosts.label_rows import LabelRows
from tests.cases import DEVICE
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.trainers import sft_trainer

CASES = {"all": lambda i: i >= 0, "some": lambda i: i % 3 > 0, "one": lambda i: i == 4, "none": lambda i: i < 0}
BY_DATA = ("nonzero", "index.Tensor", "masked_select", "masked_scatter", "_local_scalar_dense")


class Asked(TorchDispatchMode):
    """Notes operations on the device whose size depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).removeprefix("aten.").startswith(BY_DATA) and args[0].device.type == DEVICE.type:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def labels(case: str) -> Tensor:
    """Some among them -100."""
    place = torch.arange(14).view(2, 7)
    return torch.where(CASES[case](place), place, -100).to(DEVICE)


def there_and_back(label_BS: Tensor, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """As TRL does."""
    mask = label_BS[:, 1:] != -100
    taken = hidden_BSD[:, :-1][mask]
    label = label_BS[:, 1:][mask]
    x = (taken * label.unsqueeze(1)).sum(1)
    return x.new_zeros(mask.shape).masked_scatter(mask, x), mask


@pytest.mark.parametrize("case", CASES)
def test_as_by_masks_and_nothing_is_asked(case: str) -> None:
    label = labels(case)
    results = []
    for is_ours in (False, True):
        hidden = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
        rows = LabelRows(label[:, 1:])
        with Asked() as asked, rows if is_ours else torch.enable_grad():
            out, mask = there_and_back(label, hidden)
            (out * torch.arange(12.0, device=DEVICE).view(2, 6)).sum().backward()
        assert ("aten.nonzero.default" in asked.names or "aten.index.Tensor" in asked.names) is not is_ours
        if is_ours and DEVICE.type == "cuda":
            assert asked.names == []
        results.append((out, mask, hidden.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_other_masks_and_numbers_are_torchs() -> None:
    label, x = labels("some"), torch.randn(2, 6, device=DEVICE)
    for other in (label[:, :-1], label[:, 1:].clone(), label):
        with LabelRows(label[:, 1:]):
            mask = other != -100
            same = other[:, -6:] != -5
        assert torch.equal(mask.cpu(), other.cpu() != -100)
        assert same.all()
    with LabelRows(label[:, 1:]):
        assert torch.equal(x[x > 0], torch.masked_select(x, x > 0))
        assert torch.equal(label[:, 1:] != 5, label[:, 1:] - 5 != 0)


@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="TRL computes the loss otherwise there")
def test_trl_takes_its_rows_so_and_no_hook_stays(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it would score all tokens, so it is told that it has a GPU."""
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda _device: True, raising=False)
    take, masks = LabelRows._take, []
    monkeypatch.setattr(LabelRows, "_take", lambda *args: masks.append(1) or take(*args))
    model = expertune.optimize(stock(checkpoint("qwen3_moe"), lora(target_modules=["q_proj"]), torch.float32))
    trainer = sft_trainer(model, tmp_path, 2)
    hooks = list(model.get_base_model().base_model._forward_hooks)
    trainer.train()
    assert len(masks) == 2 * 2  # hidden states and labels of each step
    assert list(model.get_base_model().base_model._forward_hooks) == hooks


def test_calls_by_keyword_are_torchs_own() -> None:
    label = labels("some")
    with LabelRows(label):
        mask = label.ne(other=-100)
        put = torch.zeros_like(label).masked_scatter(mask=mask, source=label[mask])
    assert torch.equal(mask, label != -100)
    assert torch.equal(put, torch.where(mask, label, 0))
