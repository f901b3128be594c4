"""One forward and backward of a whole model, all that comes out of it, and what routing has to do with comparing it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from expertune.backends import PREFERRED
from expertune.shapes import Problem
from tests.hosts.models import batch as make_batch

Batch = dict[str, Tensor]
_PROBLEM = Problem(device="cpu", capability=None, dtype=torch.float32, widths=(32, 48, 24))
# float64 is not among what every one of them can run
BACKENDS = [backend.name for backend in PREFERRED if backend.why_not(_PROBLEM) is None]


def run(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every trained parameter, by PEFT's and Transformers' names for them.

    Without the logits of padding, which mean nothing and differ from one attention to another.
    """
    model.zero_grad(set_to_none=True)
    out = model(**batch)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads, "nothing is trained"
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient: {missing}"
    return {"logits": of_tokens(out.logits.detach(), batch), "loss": out.loss.detach()} | grads


def logits(model: nn.Module) -> dict[str, Tensor]:
    """The logits of a batch's tokens alone, without gradients."""
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in make_batch().items()}
    with torch.no_grad():
        return {"logits": of_tokens(model(**batch).logits, batch)}


def of_tokens(logits: Tensor, batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return logits if mask is None or mask.dim() > 2 else logits[mask.bool()]


def assert_equal_within(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor, relative to the largest entry of the true one."""
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        scale = expected.abs().max().item()
        off = (ours[name] - expected).abs().max().item()
        assert off <= tolerance * scale, f"{name}: off by {off:.3g}, largest entry {scale:.3g}"


def on_the_truths_routes(exact: nn.Module, *models: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """What `run` gives for each of the models, then for `exact`, by name: three batches, laid end to end.

    One batch is one throw of the dice of rounding.

    Args:
        exact: in float64; its routes are those of all.
        models: of lower precision.
    """
    passes = []
    for seed in range(3):
        routes = Routes()
        with routes.recording():
            truth = run(exact, make_batch(seed))
        assert routes.were_recorded
        results = []
        for model in models:
            with routes.replaying():
                results.append(run(model, make_batch(seed)))
        passes.append((*results, truth))
    return {
        name: tuple(torch.cat([p[i][name].reshape(-1) for p in passes]) for i in range(len(models) + 1))
        for name in passes[0][0]
    }


class Routes(TorchFunctionMode):
    """Records the indices of every `topk`, and gives them again to models whose numbers are less exact.

    Rounded numbers can choose other experts than exact ones. That is no error of the experts, and it hides theirs: so
    models of lower precision are compared on the routes of the float64 model.
    """

    def __init__(self) -> None:
        super().__init__()
        self._indices: list[Tensor] = []
        self._replayed: Iterator[Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return out
        if self._replayed is None:
            self._indices.append(out.indices)
            return out
        index = next(self._replayed)
        return torch.return_types.topk((args[0].gather(-1, index), index))

    @property
    def were_recorded(self) -> bool:
        """Whether anything chose by `topk`."""
        return bool(self._indices)

    @contextmanager
    def recording(self) -> Iterator[None]:
        with self:
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        self._replayed = iter(self._indices)
        with self:
            yield
        assert next(self._replayed, None) is None, "a route was not replayed"
