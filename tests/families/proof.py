"""What is proven of a family: the walk's outputs and every gradient against the host's eager code, in float64."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import expertune
from expertune.hosts import attention, llama4, samples
from expertune.hosts.blocks import decoders
from expertune.hosts.transformers import first_name, is_experts, layout_of
from tests.families.tiny import SIZES
from tests.hosts.passes import Routes
from tests.numerics import error

# Experts that a text gives no gradient: those of images, and those whose output nobody reads.
_IDLE = ("vision_moe.experts", "encoder.language_model.layers.3.experts")


class _Double(TorchFunctionMode):
    """Every float32 that a host asks for is float64: many compute their router, norms or gates in float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(_widened, args), **{key: _widened(value) for key, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def exactly() -> Iterator[None]:
    """Compute in float64, also where a host would not."""
    narrow = Tensor.float
    Tensor.float = Tensor.double  # a mode does not see into autograd functions, where hosts' gates run
    try:
        with _Double():
            yield
    finally:
        Tensor.float = narrow  # type: ignore[method-assign]


def run(
    model: nn.Module, seed: int = 0, parts: tuple[slice, ...] = (slice(None),), **inputs: Tensor
) -> dict[str, Tensor | None]:
    """What comes out for two rows of tokens, and the gradient of every trained parameter.

    Args:
        model: the model.
        seed: of the tokens and what backward begins with.
        parts: of the rows that are run one after another.
        inputs: beside the tokens, such as a mask; what lies beyond it is not read.
    """
    torch.manual_seed(seed)  # a diffusion model draws noise
    ids = torch.randint(3, SIZES["image_token_id"], (2, 11))
    model.zero_grad(set_to_none=True)
    outs = [model(input_ids=ids[:, part], use_cache=False, **inputs) for part in parts]
    result = torch.cat([out.logits if hasattr(out, "logits") else out.last_hidden_state for out in outs], dim=1)
    if "attention_mask" in inputs:
        result = result * inputs["attention_mask"][..., None]
    result.backward(torch.randn(result.shape).to(result.dtype))
    return {"out": result.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules, by path."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def with_adapters(model: nn.Module) -> nn.Module:
    """Stock PEFT's adapters on both projections of all experts, with factors that are both random."""
    parameters = {
        f"{'.'.join(path.split('.')[-2:])}.{name}"
        for path, module in experts_of(model).items()
        for name in (first_name(module), "down_proj")
    }
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_parameters=sorted(parameters))
    torch.manual_seed(3)
    return get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]


def farthest(ours: dict[str, Tensor | None], truth: dict[str, Tensor | None]) -> tuple[float, str]:
    """The largest difference relative to the largest entry of the true tensor, and whose it is."""
    assert ours.keys() == truth.keys()
    worst = (0.0, "")
    for name, expected in truth.items():
        result = ours[name]
        assert (result is None) == (expected is None), f"{name}: only one of the two has a gradient"
        if result is not None and expected is not None and expected.numel():
            scale = max(expected.abs().max().item(), torch.finfo(expected.dtype).tiny)
            worst = max(worst, ((result - expected).abs().max().item() / scale, name))
    return worst


def full_fine_tuning(model: PreTrainedModel) -> tuple[float, str]:
    """Every parameter is trained."""
    with exactly():
        truth = run(model)
        return farthest(run(expertune.optimize(copy.deepcopy(model), backend="native_torch")), truth)


def packed(model: PreTrainedModel) -> tuple[float, str]:
    """Every parameter is trained, on samples of 7 and 4 tokens a row: each as if it were alone, if that can be had."""
    position_ids = torch.tensor([[*range(7), *range(4)]] * 2)
    ours = expertune.optimize(copy.deepcopy(model), backend="native_torch")
    are_apart = any(attention.is_ours(decoder) and samples.hands_down(decoder) for decoder in decoders(ours))
    with exactly():
        truth = run(model, parts=(slice(7), slice(7, 11))) if are_apart else run(model, position_ids=position_ids)
        return farthest(run(ours, position_ids=position_ids), truth)


def padded(model: PreTrainedModel) -> tuple[float, str]:
    """Every parameter is trained, on one row that is padded behind and one that is not."""
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])
    with exactly():
        truth = run(model, attention_mask=mask)
        ours = expertune.optimize(copy.deepcopy(model), backend="native_torch")
        return farthest(run(ours, attention_mask=mask), truth)


def lora(model: PreTrainedModel) -> tuple[float, str]:
    """Adapters of stock PEFT on the experts."""
    with exactly():
        truth = run(with_adapters(model))
        return farthest(run(expertune.optimize(with_adapters(model), backend="native_torch")), truth)


def usual_names(model: nn.Module) -> list[str]:
    """The names by which users know the linears of experts and dense layers, as far as this model has them."""
    has_gate = all(first_name(module) == "gate_up_proj" for module in experts_of(model).values())
    return ["gate_proj", "up_proj", "down_proj"] if has_gate else ["up_proj", "down_proj"]


def by_usual_names(model: PreTrainedModel, folder: Path) -> tuple[float, str]:
    """`add_lora` by the names that users know, a step, and the adapter in stock PEFT: the output there against ours."""
    ours: Any = expertune.add_lora(copy.deepcopy(model), r=4, target_modules=usual_names(model))
    expertune.optimize(ours, backend="native_torch")
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    with exactly():
        result = run(ours)
        for path in experts_of(model):
            if path.endswith(_IDLE):
                continue
            inside = {name: grad for name, grad in result.items() if f".{path}." in name}
            assert len(inside) == 4, f"{path}: {sorted(inside)}"
            assert all(grad is not None and grad.any() for grad in inside.values()), (
                f"{path}: an adapter learns nothing"
            )
        ours.save_pretrained(folder)
        stock = PeftModel.from_pretrained(copy.deepcopy(model), folder, is_trainable=True)
        return farthest({"out": result["out"]}, {"out": run(stock)["out"]})


def checkpointed(model: PreTrainedModel, kind: str) -> tuple[float, str]:
    """Adapters on the experts under gradient checkpointing, the host's or ours (`auto`), against the same without.

    In float32, because the mode of `exactly` does not see into what backward computes again.
    """
    ours: Any = expertune.optimize(with_adapters(copy.deepcopy(model).float()), backend="native_torch")
    truth = run(ours)
    ours.enable_input_require_grads()
    if kind == "auto":
        expertune.optimize(ours, backend="native_torch", memory="auto")
    else:
        ours.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    layers = [module for module in ours.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert any(layer.gradient_checkpointing for layer in layers), "nothing is checkpointed"
    return farthest(run(ours), truth)


def generated(model: PreTrainedModel) -> tuple[Any, Any]:
    """What the walk and the host generate for two prompts, one padded on the left."""
    ids = torch.randint(3, SIZES["image_token_id"], (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True}
    results = []
    with exactly():
        for one in (expertune.optimize(copy.deepcopy(model), backend="native_torch"), model):
            one.eval()
            torch.manual_seed(0)
            made = one.generate(
                input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask, return_dict_in_generate=True, **settings
            )
            results.append(made)
            one.train()
    return results[0], results[1]


def _call_experts(module: nn.Module, x: Tensor, chosen: Tensor, weight: Tensor) -> Any:
    """What experts give for these choices; a host's that take all tokens for every expert give that too."""
    (experts,) = experts_of(module).values()
    if not llama4.is_experts(experts) or "forward" in vars(experts):
        return module(x, chosen, weight)
    num_experts = layout_of(experts).num_experts
    out_ETD = module(x.repeat(num_experts, 1)).view(num_experts, *x.shape)
    return (out_ETD[chosen, torch.arange(len(x))[:, None]] * weight.unsqueeze(-1)).sum(1)


def run_experts(model: nn.Module, path: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of one experts module under adapters, for random tokens and choices."""
    module = model.get_submodule(f"base_model.model.{path}")
    layout = layout_of(next(iter(experts_of(module).values())))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, layout.model_width, generator=generator).to(dtype).requires_grad_()
    weight, chosen = torch.rand(40, layout.num_experts, generator=generator).softmax(-1).topk(2)
    weight = weight.to(dtype).requires_grad_()
    out = _call_experts(module, x, chosen, weight)
    wanted = {"x": x, "weight": weight} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), torch.randn(out.shape, generator=generator).to(out.dtype))
    return {"out": out.detach()} | dict(zip(wanted, grads, strict=True))


def experts_in_float32(model: PreTrainedModel, backend: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """One layer's experts under adapters, by name: ours, the host's, and the truth."""
    path = next(iter(experts_of(model)))
    single = copy.deepcopy(model).float()
    with exactly():
        truth = run_experts(with_adapters(copy.deepcopy(single).double()), path, torch.float64)
    plain = run_experts(with_adapters(single), path, torch.float32)
    ours = run_experts(expertune.optimize(with_adapters(single), backend=backend), path, torch.float32)
    return {name: (ours[name], plain[name], truth[name]) for name in truth}


def in_float32(model: PreTrainedModel, backend: str) -> tuple[float, float]:
    """The whole model under adapters: how far all that comes out, joined, is from the truth, of ours and of the host's.

    All on the routes of the truth.
    """
    single = copy.deepcopy(model).float()
    exact = with_adapters(copy.deepcopy(single).double())
    routes = Routes()
    with exactly(), routes.recording():
        truth = run(exact)
    distances = []
    for one in (expertune.optimize(with_adapters(single), backend=backend), with_adapters(single)):
        with routes.replaying():
            result = run(one)
        distances.append(max(error(result[name], t) for name, t in truth.items() if t is not None and t.any()))
    return distances[0], distances[1]
