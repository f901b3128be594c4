"""What of a model takes memory in training, read from its weights, adapters and config: for `memory.needs`.

Families have parts that a text gives no gradient: towers and experts for images, the index of a sparse attention,
biases of a router. What is not known to take part is not counted.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from expertune.hosts import attention, peft, transformers
from expertune.hosts.blocks import blocks, decoders
from expertune.hosts.classes import top_k_of
from expertune.memory.needs import LayerBytes, ModelBytes

_ROW_BYTES = 14  # three words of the routing, and the router's weight in 16 bits or more
# linears that every token runs through, wherever they are
_LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


def model_bytes(model: PreTrainedModel) -> ModelBytes:
    """The bytes of a model that `optimize` has seen, with its adapters.

    Args:
        model: as it is inside PEFT's.
    """
    texts = list(_texts(model))
    parameters = list(model.parameters())
    # where nothing is run again, whether a layer keeps its input is its own affair
    with_layers = texts if model.supports_gradient_checkpointing else []
    taking_part = {id(p): p for text in texts for p in _taking_part(text) if p.requires_grad}.values()
    return ModelBytes(
        base=sum(p.nbytes for p in parameters if not p.requires_grad),
        trained=sum(p.nbytes for p in parameters if p.requires_grad),
        gradients=sum(p.nbytes for p in taking_part),
        num_gradients=sum(p.numel() for p in taking_part),
        layers=tuple(layer for text in with_layers for layer in _layer_bytes(text)),
    )


def _texts(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The models in it that a text runs through: those with experts, or where none has any, with attention of ours."""
    inner = decoders(model)
    with_experts = [decoder for decoder in inner if any(transformers.named_experts(decoder))]
    yield from with_experts or (decoder for decoder in inner if attention.is_ours(decoder))


def _taking_part(text: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The weights and factors that surely get a gradient if they are trained."""
    of_experts: set[int] = set()
    for layer in _layers(text):
        choices = [list(experts.parameters()) for experts in _experts(layer)]
        of_experts.update(id(p) for parameters in choices for p in parameters)
        yield from min(choices, key=_trained_bytes, default=())
    for name, parameter in text.named_parameters():
        if id(parameter) not in of_experts and not _LINEARS.isdisjoint(name.split(".")):
            yield parameter


def _layer_bytes(text: PreTrainedModel) -> Iterator[LayerBytes]:
    """Each layer from the first one that is trained: those before it keep nothing."""
    config = text.config.get_text_config()
    width = getattr(config, "hidden_size", 0)  # a config without these names makes the bound lower, not wrong
    top_k = top_k_of(config) or 1
    has_gradient = False
    for layer in _layers(text):
        is_trained = any(p.requires_grad for p in layer.parameters())
        if has_gradient or is_trained:
            itemsize = min((p.element_size() for p in layer.parameters() if p.is_floating_point()), default=0)
            kept = [_kept(e, top_k, has_gradient) for e in _experts(layer)]
            yield LayerBytes(input=itemsize * width, kept=min(kept, default=0))
        has_gradient = has_gradient or is_trained


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that can be checkpointed, without those within others."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _layers(child)


def _experts(layer: nn.Module) -> list[nn.Module]:
    """The experts of a layer, within PEFT's wrappers. Where they are several, a token may pass by all but one."""
    return [child for block in blocks(layer) for child in block.children() if peft.experts_in(child) is not None]


def _kept(wrapped: nn.Module, top_k: int, has_gradient: bool) -> int:
    """Bytes a token that experts keep, by the formula of docs/design.md.

    Args:
        wrapped: the experts, within PEFT's wrappers.
        top_k: of their router, at least.
        has_gradient: whether a gradient flows to what goes into their layer.
    """
    experts, ranks = peft.experts_in(wrapped), peft.trained_ranks(wrapped)
    assert experts is not None
    first, layout = transformers.first_name(experts), transformers.layout_of(experts)
    weight = experts.get_parameter(first)
    if not (has_gradient or ranks or weight.requires_grad):
        return 0
    of_token = layout.model_width if weight.requires_grad or first in ranks else 0
    of_row = layout.first_width + sum(ranks.values())
    return weight.element_size() * (of_token + top_k * of_row) + top_k * _ROW_BYTES


def _trained_bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.nbytes for p in parameters if p.requires_grad)
