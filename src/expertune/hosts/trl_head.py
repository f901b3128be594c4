"""The loss of a model that TRL trains: log-probabilities of labels by ours, where the head is frozen, and the balance
loss of its routers. Which tokens have a label is counted before the layers run: `label_rows.py`.

From 1.15 on, TRL gives a model a forward of its own (`add_fused_lm_head`), which calls an autograd function on hidden
states and head, and imports the balance loss from a host's module. That forward runs as it is, with ours under these
names: on this model alone. TRL makes it when a trainer is made, and we look for it before each batch: when the model is
set to training, or else, too late for that batch, when its decoder is called. In a step of TRL's own the balance loss
would write each token's choices out, 8 KiB a token and layer where 8 of 128 experts are chosen.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from inspect import signature
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.aside import held
from expertune.hosts.attached import attached
from expertune.hosts.label_rows import LabelRows
from expertune.hosts.twins import twin
from expertune.loss import load_balancing
from expertune.loss.log_probs import NUM_TOKENS, Head, label_log_probs

# Tokens whose gradient the device computes while a trainer reads its metrics: 1.5 ms of the 2 that it would wait, at
# Qwen3's head (H200). Their logits lie side by side, so a lean model takes no more than are there anyway; and a step of
# more tokens in all is too long for it to show.
_LAST = 2048
_MOST_TOKENS = 8192
_NAME = "_ChunkedLogProbFunction"  # of TRL's autograd function, in the module of its forward
_OURS = {"log_probs", "entropy", "is_top1"}
_TAKES = (  # what its `forward` takes, in this order
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
_IMPORTS = {"transformers.models.mixtral.modeling_mixtral": load_balancing.__name__}  # where it finds the balance loss


class _LogProbs:
    """Stands for TRL's autograd function, whose `apply` is what its forward calls.

    Args:
        host: TRL's.
        forward: TRL's, which called it.
        model: which has it.
    """

    def __init__(self, host: Any, forward: FunctionType, model: nn.Module) -> None:
        self.host = host
        self.forward = forward
        self._model = model

    def apply(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        label_N: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """TRL's outputs, in their order; None for those that were not asked for."""
        if not _is_ours(hidden_ND, weight_VD, bias_V, outputs):
            given: tuple[Tensor | None, ...] = self.host.apply(
                hidden_ND, weight_VD, bias_V, label_N, temperature, chunk_size, softcap, scale, outputs
            )
            return given
        head = Head(weight_VD, bias_V, scale=scale, softcap=softcap, inv_t=1 / temperature)
        last = NUM_TOKENS if _is_lean(self._model) else _LAST
        last = last if len(label_N) <= _MOST_TOKENS else 0
        log_prob_N, entropy_N, is_top1_N = label_log_probs(hidden_ND.to(weight_VD.dtype), label_N, head, last)
        entropy = entropy_N if "entropy" in outputs else None
        return log_prob_N, entropy, None, None, is_top1_N if "is_top1" in outputs else None


def bind(model: nn.Module) -> None:
    """Give a model whose forward is TRL's the same one with our log-probabilities."""
    forward = _forward(model)
    if forward is None or _NAME not in forward.__code__.co_names:
        return
    host = forward.__globals__.get(_NAME)
    if host is not None and not isinstance(host, _LogProbs) and _is_known(host):  # None: TRL found no Triton
        ours = twin(forward, {_NAME: _LogProbs(host, forward, model)}, _IMPORTS)
        model.forward = MethodType(_counting_labels(ours), model)


def _is_known(host: Any) -> bool:
    """Whether TRL's function takes what ours does: another TRL may ask for more, and then keeps its own."""
    return tuple(signature(host.forward).parameters)[1:] == _TAKES


def unbind(model: nn.Module) -> None:
    """Undo `bind`, unless someone has given the model another forward since."""
    if (ours := _bound(model)) is not None:
        model.forward = MethodType(ours.forward, model)


def is_bound(model: nn.Module) -> bool:
    """Whether a model's forward is the one that `bind` gave it."""
    return _bound(model) is not None


def _counting_labels(forward: FunctionType) -> FunctionType:
    """TRL's forward, which knows how many tokens have a label when the layers have been submitted."""

    @wraps(forward)
    def counting(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        label, backbone = _label(kwargs), model.base_model
        if label is None or backbone is model or torch.compiler.is_compiling():
            return forward(model, *args, **kwargs)
        rows = LabelRows(label)
        with held(), ExitStack() as stack:

            def after_layers(*_: Any) -> None:
                stack.enter_context(rows)

            stack.callback(backbone.register_forward_hook(after_layers).remove)
            return forward(model, *args, **kwargs)

    return cast(FunctionType, counting)


def _label(kwargs: dict[str, Any]) -> Tensor | None:
    """What TRL's forward compares with the label of what is not learned."""
    if not kwargs.get("fused_lm_head"):
        return None
    shifted: Tensor | None = kwargs.get("shift_labels")
    given: Tensor | None = kwargs.get("labels")
    return shifted if shifted is not None or given is None else given[:, 1:]


def _bound(model: nn.Module) -> _LogProbs | None:
    inner = getattr(_forward(model), "__wrapped__", None)
    ours = inner.__globals__.get(_NAME) if isinstance(inner, FunctionType) else None
    return ours if isinstance(ours, _LogProbs) else None


def _forward(model: nn.Module) -> FunctionType | None:
    """The function that was given to this one model for its forward."""
    function: Callable[..., Any] | None = getattr(vars(model).get("forward"), "__func__", None)
    return function if isinstance(function, FunctionType) else None


def _is_lean(model: nn.Module) -> bool:
    state = attached(model)
    return state is not None and state.memory is not None and state.memory.name == "lean"


def _is_ours(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, outputs: tuple[str, ...]) -> bool:
    """Whether the head is frozen and computes in its own dtype, and no more is asked for than ours gives."""
    is_trained = any(x is not None and x.requires_grad for x in (weight_VD, bias_V))
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    is_plain = not is_trained and weight_VD.dtype == dtype and not torch.compiler.is_compiling()
    return is_plain and _OURS.issuperset(outputs)
