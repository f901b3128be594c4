"""Each update is torch's; between updates the moments are rounded, and nothing else is lost."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertune import AdamW8bit
from expertune.optim import dynamic_8bit
from expertune.optim.fused_step import _launcher
from tests.cases import DEVICE

SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, *, is_signed: bool) -> Tensor:
    """By searching all 256 values, block by block."""
    values = dynamic_8bit.values(is_signed=is_signed)
    blocks = []
    for block in x.flatten().split(256):
        maximum = block.abs().max()
        blocks.append(values[(block[:, None] / maximum - values).abs().argmin(dim=1)] * maximum)
    return torch.cat(blocks).view(x.shape)


def test_the_first_step_is_torchs() -> None:
    ours, theirs = nn.Parameter(draw(40, 30)), nn.Parameter(draw(40, 30))
    for param, optimizer in ((ours, AdamW8bit([ours], **SETTINGS)), (theirs, torch.optim.AdamW([theirs], **SETTINGS))):
        param.grad = draw(40, 30, seed=1)
        optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_later_steps_are_torchs_on_rounded_moments() -> None:
    ours, theirs = nn.Parameter(draw(40, 30)), nn.Parameter(draw(40, 30))
    optimizer, reference = AdamW8bit([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    for seed in range(1, 6):
        ours.grad = theirs.grad = draw(40, 30, seed=seed)
        optimizer.step()
        reference.step()
        state = reference.state[theirs]
        state["exp_avg"] = rounded(state["exp_avg"], is_signed=True)
        state["exp_avg_sq"] = rounded(state["exp_avg_sq"], is_signed=False)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipped_in_the_step_as_before_it(max_norm: float) -> None:
    ours, theirs = ([nn.Parameter(draw(40, 30, seed=i)) for i in range(2)] for _ in range(2))
    optimizer, reference = AdamW8bit(ours, **SETTINGS), AdamW8bit(theirs, **SETTINGS)
    for seed in range(1, 4):
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad, other.grad = draw(40, 30, seed=10 * seed + i), draw(40, 30, seed=10 * seed + i)
        norm = nn.utils.clip_grad_norm_(theirs, max_norm)
        optimizer.clip_coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        optimizer.step()
        reference.step()
        assert all(map(torch.equal, ours, theirs))
        assert optimizer.clip_coef is None, "it is of one step"
    assert all(map(torch.equal, tensors(optimizer), tensors(reference)))


def test_a_plain_number_clips_too() -> None:
    ours, theirs = (nn.Parameter(draw(40, 30)) for _ in range(2))
    for param, clip_coef in ((ours, 0.25), (theirs, torch.tensor(0.25))):
        optimizer = AdamW8bit([param], **SETTINGS)
        param.grad, optimizer.clip_coef = draw(40, 30, seed=1), clip_coef
        optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 0, 4), (2, 1, 0)])
def test_a_parameter_without_numbers_is_stepped_beside_others(shape: tuple[int, ...]) -> None:
    params = [nn.Parameter(draw(*shape)), nn.Parameter(draw(40, 30))]
    before = params[1].detach().clone()
    optimizer = AdamW8bit(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not torch.equal(params[1], before)


def test_the_state_takes_two_bytes_a_parameter() -> None:
    param = nn.Parameter(draw(256, 64))
    param.grad = draw(256, 64, seed=1)
    optimizer = AdamW8bit([param])
    optimizer.step()
    taken = sum(t.nbytes for t in optimizer.state[param].values() if isinstance(t, Tensor))
    assert taken == 2 * param.numel() + 2 * 4 * param.numel() // 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_from_its_state(dtype: torch.dtype) -> None:
    first = nn.Parameter(draw(30, 20).to(dtype))
    optimizer = AdamW8bit([first], **SETTINGS)
    for seed in (1, 2):
        first.grad = draw(30, 20, seed=seed).to(dtype)
        optimizer.step()
    second = nn.Parameter(first.detach().clone())
    resumed = AdamW8bit([second], lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, each in ((first, optimizer), (second, resumed)):
        param.grad = draw(30, 20, seed=3).to(dtype)
        each.step()
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer), tensors(resumed), strict=True))


def tensors(optimizer: AdamW8bit) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def test_a_transposed_parameter_with_a_contiguous_gradient() -> None:
    straight, transposed = nn.Parameter(draw(20, 30)), nn.Parameter(draw(20, 30).T.contiguous().T)
    assert not transposed.is_contiguous()
    for param in (straight, transposed):
        optimizer = AdamW8bit([param], **SETTINGS)
        for seed in (1, 2):
            param.grad = draw(20, 30, seed=seed)
            optimizer.step()
    torch.testing.assert_close(straight, transposed, rtol=0, atol=2e-3)  # other blocks, so another rounding
    assert not torch.equal(straight, draw(20, 30))


def test_parameters_without_gradient_stay_and_groups_keep_their_settings() -> None:
    still, decayed, free = (nn.Parameter(torch.ones(300)) for _ in range(3))
    groups = [{"params": [still, decayed], "weight_decay": 0.5}, {"params": [free], "weight_decay": 0.0}]
    optimizer = AdamW8bit(groups, lr=0.1)
    decayed.grad = free.grad = torch.zeros(300)
    optimizer.step()
    assert torch.equal(still, torch.ones(300))
    torch.testing.assert_close(decayed, torch.full((300,), 0.95))
    assert torch.equal(free, torch.ones(300))


def test_what_a_user_puts_into_the_state_is_what_is_stepped() -> None:
    """As who moves moments to the host between steps does it."""
    params = [torch.nn.Parameter(torch.randn(3, 300)) for _ in range(3)]
    expected = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = AdamW8bit(params), AdamW8bit(expected)
    for number in range(6):
        for pair in zip(params, expected, strict=True):
            grad = torch.randn(3, 300, generator=torch.Generator().manual_seed(number))
            for p in pair:
                p.grad = grad.clone()
        if number == 2:
            moment = ours.state[params[0]]["exp_avg"] = ours.state[params[0]]["exp_avg"].clone()
        if number == 3:
            assert torch.equal(moment, theirs.state[expected[0]]["exp_avg"])
            ours.state[params[1]] = dict(ours.state[params[1]])
        if number == 4:
            params[2].data = params[2].data.clone()
        ours.step()
        theirs.step()
        assert [state["step"] for state in ours.state.values()] == [number + 1] * 3
    assert all(map(torch.equal, params, expected))
    again = copy.deepcopy(ours)
    for p in again.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    again.step()
    assert [state["step"] for state in again.state.values()] == [7] * 3


def test_a_closure_is_called_with_gradients_on() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW8bit([param], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (param < 1).all()


def test_what_it_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"betas in \[0, 1\), got .*betas=\(1.0, 0.9\)"):
        AdamW8bit([nn.Parameter(torch.ones(3))], betas=(1.0, 0.9))
    with pytest.raises(ValueError, match=r"got a parameter in torch\.float64"):
        AdamW8bit([nn.Parameter(torch.ones(3, dtype=torch.float64))])
    optimizer = AdamW8bit([nn.Parameter(torch.ones(3))])
    for apart in (torch.ones(4, 5)[:, :3], torch.ones(3).expand(2, 3)):
        with pytest.raises(ValueError, match=r"without gaps; got one of shape .* with strides"):
            optimizer.add_param_group({"params": [nn.Parameter(apart)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(4, 1, 3).permute(2, 1, 0)), nn.Parameter(torch.ones(()))]}
    )
    other = torch.optim.AdamW([(param := nn.Parameter(torch.ones(3)))])
    param.grad = torch.ones(3)
    other.step()
    with pytest.raises(ValueError, match=r"expected the state of an AdamW8bit, with .*; got step, exp_avg, exp_avg_sq"):
        AdamW8bit([param]).load_state_dict(other.state_dict())
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match=r"no sparse gradients\. Use torch\.optim\.SparseAdam"):
        AdamW8bit([param]).step()


def test_no_step_is_far_beyond_torchs_where_gradients_are_zero() -> None:
    """Experts that see no token: factors lie expert by expert, so a block holds numbers with and without a gradient.

    A second moment that was rounded to nothing would leave the first to be divided by eps.
    """
    generator, lr, farthest = torch.Generator().manual_seed(0), 1e-3, {}
    for kind in (torch.optim.AdamW, AdamW8bit):
        generator.manual_seed(0)
        param, steps = nn.Parameter(torch.zeros(32, 8 * 64)), []
        optimizer = kind([param], lr=lr, weight_decay=0.0)
        for _ in range(30):
            has_tokens = (torch.rand(64, generator=generator) > 0.5).float().repeat(8)
            param.grad = torch.randn(param.shape, generator=generator) * has_tokens
            before = param.detach().clone()
            optimizer.step()
            steps.append((param.detach() - before).abs().max() / lr)
        farthest[kind] = max(steps)
    assert farthest[AdamW8bit] < 2 * farthest[torch.optim.AdamW]


@pytest.mark.parametrize("shape", [(64, 32), (8, 32)], ids=["of a larger", "of a smaller"])
def test_the_state_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    """As of an adapter of another rank: a kernel would write beside its memory."""
    param, other = nn.Parameter(draw(16, 32)), nn.Parameter(draw(*shape))
    other.grad, saved = draw(*shape), AdamW8bit([other])
    saved.step()
    optimizer = AdamW8bit([param])
    with pytest.raises(ValueError, match="another size"):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state, "nothing of it was taken"


@pytest.mark.parametrize("settings", [{"lr": float("nan")}, {"betas": (0.9,)}, {"eps": -1.0}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected lr, eps and weight_decay"):
        AdamW8bit([nn.Parameter(draw(4))], **settings)


def test_a_graph_from_before_a_step_is_refused_by_autograd() -> None:
    """It would compute with parameters that were others in its forward."""
    weight = torch.randn(8, 8, device=DEVICE).requires_grad_()
    hidden = torch.randn(4, 8, device=DEVICE).requires_grad_() @ weight
    first, second = hidden.sum(), (hidden @ weight).square().sum()
    first.backward(retain_graph=True)
    optimizer, before = AdamW8bit([weight]), weight._version
    optimizer.step()
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_moments_on_another_device_are_refused() -> None:
    weight = torch.randn(8, 8, device=DEVICE).requires_grad_()
    weight.grad = torch.ones_like(weight)
    optimizer = AdamW8bit([weight])
    optimizer.step()
    state = optimizer.state[weight]
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.to("meta")
    with pytest.raises(ValueError, match=r"the moments of parameters on .* lie on meta"):
        optimizer.step()


def test_moments_in_memory_that_moves_lie_wherever_they_are_wanted() -> None:
    """As bitsandbytes' paged optimizers have them: tensors of the CPU by their name, which a GPU reads as well."""
    codes = torch.zeros(8, 8, dtype=torch.uint8)
    paged = [codes.clone(), codes.clone(), torch.zeros(1), torch.zeros(1)]
    for each in paged:
        each.is_paged = True
    elsewhere = torch.empty(8, 8, device="meta")
    assert callable(_launcher([elsewhere], [paged], is_by_chance=False))
    del paged[0].is_paged
    with pytest.raises(ValueError, match="on meta lie on cpu"):
        _launcher([elsewhere], [paged], is_by_chance=False)
