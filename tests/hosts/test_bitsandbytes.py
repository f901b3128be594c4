"""bitsandbytes' 8-bit AdamW on a model of ours: its state and its steps to rounding, in our launch."""

import copy
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import optimizer as optimizer_module

import expertune
from expertune.hosts import bitsandbytes as hooks
from expertune.optim import dynamic_8bit
from tests.cases import DEVICE
from tests.conftest import Checkpoint
from tests.hosts.models import load_tiny
from tests.hosts.trainers import sft_trainer

bnb = pytest.importorskip("bitsandbytes")
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
STATE = ("state1", "state2", "absmax1", "absmax2")
LORA = LoraConfig(r=32, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this device, and for the models of these tests alone."""
    monkeypatch.setattr(hooks, "_DEVICES", (DEVICE.type,))
    monkeypatch.setattr(hooks, "_models", WeakSet())
    while hooks._handles:
        hooks._handles.pop().remove()
    bnb.optim.GlobalOptimManager.get_instance().initialize()  # it knows parameters by numbers that come again


class Model(nn.Module):
    """Parameters of every kind that a step may meet."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = ((40, 128), (7, 900), (16, 16), (5000,))  # the third has moments in 32 bits
        drawn = [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes]
        self.params = nn.ParameterList(map(nn.Parameter, drawn))

    def draw_grads(self, seed: int) -> list[Tensor]:
        """Of two magnitudes, so that no second moment is rounded to zero, where theirs differs."""
        generator = torch.Generator().manual_seed(seed)
        for param in self.params:
            scale = 10 ** (2 * torch.rand(param.shape, generator=generator) - 3)
            param.grad = (torch.randn(param.shape, generator=generator).sign() * scale).to(param)
        return [param.grad.clone() for param in self.params]  # type: ignore[misc]


@pytest.fixture
def steps_of_theirs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of parameters that bitsandbytes steps."""
    stepped: list[int] = []
    theirs = bnb.optim.optimizer.Optimizer2State.update_step

    def update_step(self: Any, group: Any, p: Tensor, *args: Any) -> None:
        stepped.append(p.numel())
        theirs(self, group, p, *args)

    monkeypatch.setattr(bnb.optim.optimizer.Optimizer2State, "update_step", update_step)
    return stepped


@pytest.fixture
def models(request: pytest.FixtureRequest) -> Any:
    """One that is ours and one that is not, of the same numbers."""
    dtype = getattr(request, "param", torch.float32)
    ours, theirs = Model(dtype), Model(dtype)
    hooks.take_over(ours)
    yield ours, theirs
    hooks.give_back(ours)


def assert_alike(ours: Model, theirs: Model, optimizer: Any, reference: Any, rtol: float) -> None:
    for param, expected in zip(ours.params, theirs.params, strict=True):
        difference, bound = (param - expected).abs(), 1e-4 + rtol * expected.abs()
        assert (difference > bound).float().mean() < 0.01  # where a moment lies in the middle of two values
        assert (difference < bound + SETTINGS["lr"] / 5).all()
        mine, other = optimizer.state[param], reference.state[expected]
        assert mine["step"] == other["step"] and mine.keys() == other.keys()
        if mine["state1"].dtype == torch.float32:
            assert torch.equal(mine["state1"], other["state1"])
            continue
        for codes, maximum in (("state1", "absmax1"), ("state2", "absmax2")):
            torch.testing.assert_close(mine[maximum], other[maximum], rtol=1e-2, atol=0)
            is_off = (mine[codes].int() - other[codes].int()).abs() > 1
            assert is_off.float().mean() < 0.01


@pytest.mark.parametrize("models", [torch.float32, torch.bfloat16], indirect=True)
def test_a_step_is_theirs_to_rounding(models: tuple[Model, Model], steps_of_theirs: list[int]) -> None:
    ours, theirs = models
    # on a GPU theirs rounds to bfloat16 before it decays, too
    settings = SETTINGS if ours.params[0].dtype == torch.float32 else SETTINGS | {"weight_decay": 0.0}
    optimizer = bnb.optim.AdamW8bit(ours.parameters(), **settings)
    reference = bnb.optim.AdamW8bit(theirs.parameters(), **settings)
    for seed in range(1, 5):
        grads = ours.draw_grads(seed)
        theirs.draw_grads(seed)
        steps_of_theirs.clear()
        optimizer.step()
        assert all(map(torch.equal, [param.grad for param in ours.params], grads))
        assert len(steps_of_theirs) == (4 if seed == 1 else 1), "theirs are the first step, and moments in 32 bits"
        reference.step()
        assert len(steps_of_theirs) == (8 if seed == 1 else 5)
    # in bfloat16 a difference in float32 may be rounded to the next number
    assert_alike(ours, theirs, optimizer, reference, 2**-7 if ours.params[0].dtype == torch.bfloat16 else 1e-4)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_moments_are_stepped_where_they_are(models: tuple[Model, Model], steps_of_theirs: list[int]) -> None:
    """On a GPU those of 100,000 numbers or more lie in memory that is moved to it and back."""
    large, expected = (nn.Parameter(torch.linspace(-1, 1, 120_000, device=DEVICE)) for _ in range(2))
    models[0].params.append(large)
    optimizer, reference = bnb.optim.PagedAdamW8bit([large], lr=1e-2), bnb.optim.AdamW8bit([expected], lr=1e-2)
    for seed in range(3):
        for param, each in ((large, optimizer), (expected, reference)):
            param.grad = torch.linspace(-1, 1 + seed, 120_000, device=DEVICE)
            each.step()
    torch.testing.assert_close(large, expected, rtol=0, atol=1e-4)
    assert len(steps_of_theirs) == 1 + 3
    assert getattr(optimizer.state[large]["state1"], "is_paged", False) == (DEVICE.type == "cuda")


def test_one_step_from_the_same_state_differs_by_float32s_rounding(models: tuple[Model, Model]) -> None:
    ours, theirs = models
    settings = SETTINGS | {"weight_decay": 0.0}
    optimizer = bnb.optim.AdamW8bit(ours.parameters(), **settings)
    reference = bnb.optim.AdamW8bit(theirs.parameters(), **settings)
    for seed in (1, 2):
        for model, each in ((ours, optimizer), (theirs, reference)):
            model.draw_grads(seed)
            each.step()
        if seed == 1:
            assert all(map(torch.equal, ours.params, theirs.params))
    for param, expected in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)


def test_what_bitsandbytes_reads_back_goes_on(models: tuple[Model, Model]) -> None:
    ours, theirs = models
    optimizer = bnb.optim.AdamW8bit(ours.parameters(), **SETTINGS)
    for seed in (1, 2):
        ours.draw_grads(seed)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    theirs.load_state_dict(ours.state_dict())
    reference = bnb.optim.AdamW8bit(theirs.parameters(), **SETTINGS)
    reference.load_state_dict(saved)
    optimizer.load_state_dict(copy.deepcopy(saved))
    for seed in (3, 4):
        for model, each in ((ours, optimizer), (theirs, reference)):
            model.draw_grads(seed)
            each.step()
    assert_alike(ours, theirs, optimizer, reference, 1e-4)


def test_a_moment_above_zero_is_never_rounded_to_zero() -> None:
    """An expert that sees no token once would take a step of its first moment divided by eps."""
    model = Model(torch.float32)
    hooks.take_over(model)
    param = model.params[3]
    optimizer = bnb.optim.AdamW8bit([param], lr=1e-3)
    for grad in (torch.ones(5000), torch.ones(5000), torch.zeros(5000)):
        param.grad = grad.to(DEVICE)
        param.grad[1] *= 1e-5  # by which its second moment is 1e-10 of its block's maximum
        before = param.detach().clone()
        optimizer.step()
    hooks.give_back(model)
    assert (param - before).abs().max() < 2e-3
    values = dynamic_8bit.values(is_signed=False).to(DEVICE)
    assert values[optimizer.state[param]["state2"][1].long()] > 0


@pytest.mark.parametrize("kind", ["overridden", "a closure", "32 bits", "one moment", "max_unorm", "a subclass"])
def test_what_is_otherwise_is_theirs(kind: str, models: tuple[Model, Model], steps_of_theirs: list[int]) -> None:
    ours, _ = models
    if kind == "overridden":
        bnb.optim.GlobalOptimManager.get_instance().override_config(ours.params[0], "optim_bits", 32)
    subclass = type("Mine", (bnb.optim.AdamW8bit,), {})
    make: dict[str, Any] = {
        "32 bits": bnb.optim.AdamW32bit,
        "a subclass": subclass,
        "one moment": bnb.optim.Adagrad8bit,
    }
    optimizer = make.get(kind, bnb.optim.AdamW8bit)(ours.parameters(), lr=1e-3)
    if kind == "max_unorm":
        optimizer.args.max_unorm = 1.0
    for seed in (1, 2):
        ours.draw_grads(seed)
        steps_of_theirs.clear()
        optimizer.step(*([lambda: 0.0] if kind == "a closure" else []))
    expected = {"overridden": [5120, 256], "one moment": []}.get(kind, [5120, 6300, 256, 5000])
    assert steps_of_theirs == expected
    assert all(param.grad is not None for param in ours.params)


def test_hooks_see_and_change_gradients_as_ever(models: tuple[Model, Model]) -> None:
    ours, theirs = models
    optimizers = [bnb.optim.AdamW8bit(model.parameters(), **SETTINGS) for model in models]
    seen: list[list[bool]] = []

    def flip(optimizer: Any, *_: Any) -> None:
        params = optimizer.param_groups[0]["params"]
        seen.append([param.grad is not None for param in params])
        for param in params:
            param.grad.mul_(-1)

    handle = optimizer_module.register_optimizer_step_pre_hook(flip)
    for optimizer in optimizers:
        optimizer.register_step_pre_hook(flip)
        optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    for seed in range(1, 4):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.draw_grads(seed)
            if seed == 2:  # later than ours
                optimizer.register_step_pre_hook(flip)
            optimizer.step()
            assert all(param.grad is None for param in model.params)
    handle.remove()
    assert all(map(all, seen))
    assert_alike(ours, theirs, *optimizers, 1e-4)


def test_a_step_that_fails_loses_no_gradient(models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = models
    optimizer = bnb.optim.AdamW8bit(ours.parameters(), **SETTINGS)
    ours.draw_grads(1)
    optimizer.step()
    grads = ours.draw_grads(2)
    before = [param.detach().clone() for param in ours.params]
    fails = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert all(map(torch.equal, ours.params, before)), "nothing was stepped"
    fails.remove()
    monkeypatch.setattr(optimizer, "update_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()
    assert all(map(torch.equal, [param.grad for param in ours.params], grads))


def test_models_may_come_and_go_within_a_step(models: tuple[Model, Model]) -> None:
    ours, other = models
    optimizer = bnb.optim.AdamW8bit(ours.parameters())
    optimizer.register_step_pre_hook(lambda *_: hooks.take_over(other))
    optimizer.register_step_post_hook(lambda *_: hooks.give_back(other))
    for seed in (1, 2, 3):
        grads = ours.draw_grads(seed)
        optimizer.step()
        assert all(map(torch.equal, [param.grad for param in ours.params], grads))


def test_counts_of_steps_may_differ(models: tuple[Model, Model]) -> None:
    """As after a step with a closure in which some parameters have no gradient."""
    ours, theirs = models
    optimizers = [bnb.optim.AdamW8bit(model.parameters(), **SETTINGS) for model in models]
    for seed in range(1, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.draw_grads(seed)
            if seed == 3:
                model.params[0].grad = None
            optimizer.step(*([lambda: 0.0] if seed == 3 else []))
    assert_alike(ours, theirs, *optimizers, 1e-4)


def test_what_is_overridden_in_mid_run_is_theirs(models: tuple[Model, Model], steps_of_theirs: list[int]) -> None:
    ours, _ = models
    optimizer = bnb.optim.AdamW8bit(ours.parameters())
    for seed in (1, 2):
        ours.draw_grads(seed)
        optimizer.step()
    bnb.optim.GlobalOptimManager.get_instance().override_config(ours.params[0], "lr", 0.0)
    ours.draw_grads(3)
    before = ours.params[0].detach().clone()
    optimizer.step()
    assert torch.equal(ours.params[0], before)


def test_optimizers_of_others_are_not_asked(models: tuple[Model, Model]) -> None:
    class Odd(torch.optim.SGD):
        initialized = torch.ones(2)

        def __eq__(self, other: object) -> bool:
            return NotImplemented

    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    Odd([param], lr=1.0).step()
    assert param.tolist() == [0, 0, 0]


def test_other_models_are_left_alone(models: tuple[Model, Model], steps_of_theirs: list[int]) -> None:
    ours, theirs = models
    optimizers = [bnb.optim.AdamW8bit(model.parameters()) for model in (ours, theirs)]
    for seed in (1, 2):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.draw_grads(seed)
            steps_of_theirs.clear()
            optimizer.step()
    assert len(steps_of_theirs) == 4
    hooks.give_back(ours)
    ours.draw_grads(3)
    steps_of_theirs.clear()
    optimizers[0].step()
    assert len(steps_of_theirs) == 4
    assert not optimizer_module._global_optimizer_pre_hooks, "with no model left torch calls no hook of ours"


def test_a_trainer_by_the_name_that_it_knows(
    checkpoint: Checkpoint, tmp_path: Path, steps_of_theirs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an eps beside which second moments count for little, so that none that theirs rounds to zero does."""
    folder = checkpoint("qwen3_moe")

    def trained(*, is_ours: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = expertune.optimize(load_tiny(folder, torch.float32))
        monkeypatch.setattr(hooks, "_DEVICES", (DEVICE.type,) if is_ours else ())
        steps_of_theirs.clear()
        settings = {"optim": "adamw_8bit", "adam_epsilon": 0.1, "learning_rate": 0.1}
        trainer = sft_trainer(model, tmp_path, 4, peft_config=LORA, **settings)
        trainer.train()
        expertune.restore(model)
        return [param.detach() for param in trainer.model.parameters() if param.requires_grad]

    expected = trained(is_ours=False)
    num_stepped = len(steps_of_theirs)
    moved = [param.abs().max() for param in expected]
    for param, other, largest in zip(trained(is_ours=True), expected, moved, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=float(largest) * 1e-2)
    assert (num_stepped, len(steps_of_theirs)) == (4 * 8, 8 + 3 * 4), "four of eight are smaller than 4,096 numbers"
