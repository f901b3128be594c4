"""How wide a layer of a host is, by its weights: an estimate of its activations before any step was measured."""

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig

from expertune.hosts.classes import top_k_of
from expertune.hosts.transformers import is_experts, layout_of


def width_of(layer: nn.Module, config: PreTrainedConfig) -> int:
    """Numbers a token that the second run of a layer and its backward hold at once, by an estimate.

    The outputs of all its products and norms, twice: once as what is kept of them, once as gradients. Not all are there
    at once, which makes up for what lies between them. LoRA's factors are little beside that.

    Args:
        layer: with its experts, if it has any.
        config: of the model. Where it does not say how many experts a token takes, all are counted.
    """
    top_k = top_k_of(config)
    tuners = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    held = [getattr(tuner, name, None) for tuner in tuners for name in tuner.adapter_layer_names]
    factors = {inner for each in held if isinstance(each, nn.Module) for inner in each.modules()}
    width = 0
    for module in layer.modules():
        if is_experts(module):
            layout = layout_of(module)
            width += (top_k or layout.num_experts) * (layout.first_width + layout.model_width)
        elif isinstance(module, nn.Linear) and module not in factors:
            width += module.out_features
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 1:
            width += weight.numel()
    return 2 * width
