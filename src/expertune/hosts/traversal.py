"""How a trainer goes through all modules of a model at every step, while the device waits.

Transformers' trainer sets every module to training, with a call for each; counts the parameters, to report
floating-point operations, for which the host builds the names of all; and goes through them to clip their gradients and
to drop these. A layer with adapters holds some seventy modules, so each of the four takes longer than submitting it.
Here they go over a list of the modules, made anew when one has come or gone, which two thousand comparisons in C tell.
"""

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from operator import contains, eq
from types import MethodType
from typing import Any, NamedTuple

from torch import nn
from torch.nn import Parameter
from transformers import PreTrainedModel

_OF_ALL = ("parameters",)
_OF_MODELS = ("parameters", "train", "num_parameters")  # what wraps a model hands these on to it


def bind(model: nn.Module, on_train: Callable[[nn.Module], None] | None = None) -> None:
    """Let a trainer go through a model, or what PEFT has wrapped it in, so.

    Args:
        model: is gone through.
        on_train: is told of the model whenever it is set to training or evaluation, as trainers do before each batch.
    """
    traversal = Traversal(model, on_train)
    for name in _OF_MODELS if isinstance(model, PreTrainedModel) else _OF_ALL:
        if name not in vars(model):
            vars(model)[name] = getattr(traversal, name)


def unbind(model: nn.Module) -> None:
    """Undo `bind`, unless someone has given the model other methods since."""
    for name in _OF_MODELS:
        if is_bound(model, name):
            del vars(model)[name]


def is_bound(model: nn.Module, name: str) -> bool:
    """Whether a model's method is ours."""
    bound = vars(model).get(name)
    return isinstance(bound, MethodType) and isinstance(bound.__self__, Traversal)


class _Flat(NamedTuple):
    """The modules of a model in the order of `nn.Module.modules`, and how to tell that they are the same still.

    Args:
        modules: each once.
        attributes: of each module those of its own.
        children: the dictionaries in which those hold modules that hold any.
        were: what was in these.
        parameters: the dictionaries in which those hold parameters that hold any.
        empty: the dictionaries of both kinds that nothing was in.
        trains_plainly: whether no class among them does more on `train` than to hand it on.
    """

    modules: list[nn.Module]
    attributes: list[dict[str, Any]]
    children: list[dict[str, Any]]
    were: list[dict[str, Any]]
    parameters: list[dict[str, Any]]
    empty: list[dict[str, Any]]
    trains_plainly: bool

    @classmethod
    def of(cls, model: nn.Module) -> "_Flat":
        """As the model is now."""
        modules = list(model.modules())
        children: list[dict[str, Any]] = [module._modules for module in modules]
        parameters: list[dict[str, Any]] = [module._parameters for module in modules]
        filled = [each for each in children if each]
        return cls(
            modules=modules,
            attributes=list(map(vars, modules)),
            children=filled,
            were=[dict(each) for each in filled],
            parameters=[each for each in parameters if each],
            empty=[each for each in (*children, *parameters) if not each],
            trains_plainly=all(map(_is_plain, modules)),
        )

    def is_the_models(self) -> bool:
        """Whether no module has come, gone, or changed places, and none has its first parameter."""
        return not any(self.empty) and all(map(eq, self.children, self.were))

    def held(self) -> list[Parameter]:
        """The parameters of all, shared ones more than once."""
        return [each for each in chain.from_iterable(map(dict.values, self.parameters)) if each is not None]


class _Counted(NamedTuple):
    """The last count of parameters.

    Args:
        call: what was asked for, and of which parameters: by `id`, and if it matters whether they are trained.
        parameters: they live on, so that no other gets the address of one.
        total: the answer.
    """

    call: tuple[bool, bool, list[int], list[bool]]
    parameters: list[Parameter]
    total: int


class Traversal:
    """Of one model.

    Args:
        model: holds the modules.
        on_train: see `bind`.
    """

    def __init__(self, model: nn.Module, on_train: Callable[[nn.Module], None] | None = None) -> None:
        self._model = model
        self._on_train = on_train
        self._flat: _Flat | None = None
        self._counted: _Counted | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model has modules of its own."""
        return vars(self) | {"_flat": None, "_counted": None}

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """As `nn.Module.parameters`, whose argument this is."""
        if not recurse:
            return type(self._model).parameters(self._model, recurse)
        held = self._modules().held()
        return iter(dict(zip(map(id, held), held, strict=True)).values())

    def train(self, mode: bool = True) -> nn.Module:
        """As `nn.Module.train`, whose argument this is."""
        model, flat = self._model, self._modules()
        if self._on_train is not None:
            self._on_train(model)
        has_own = map(contains, flat.attributes[1:], repeat("train"))
        if not isinstance(mode, bool) or not flat.trains_plainly or any(has_own):
            return type(model).train(model, mode)
        for module, attributes in zip(flat.modules, flat.attributes, strict=True):
            if attributes.get("training") is not mode:
                module.training = mode
        return model

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As `PreTrainedModel.num_parameters`, whose arguments these are."""
        model = self._model
        assert isinstance(model, PreTrainedModel)
        if getattr(model, "is_loaded_in_4bit", False):  # the host counts what is packed
            return type(model).num_parameters(model, only_trainable, exclude_embeddings)
        held = self._modules().held()
        trained = [p.requires_grad for p in held] if only_trainable else []
        call = (only_trainable, exclude_embeddings, list(map(id, held)), trained)
        if self._counted is None or self._counted.call != call:
            self._counted = _Counted(call, held, self._count(only_trainable, exclude_embeddings))
        return self._counted.total

    def _count(self, only_trainable: bool, exclude_embeddings: bool) -> int:
        total, seen = 0, set()
        for module in self._modules().modules:
            for name, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                is_left = exclude_embeddings and name == "weight" and isinstance(module, nn.Embedding)
                if not is_left and (parameter.requires_grad or not only_trainable):
                    total += parameter.numel()
        return total

    def _modules(self) -> _Flat:
        if self._flat is None or not self._flat.is_the_models():
            self._flat = _Flat.of(self._model)
        return self._flat


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's class does no more on `train` than to hand it on to what it holds."""
    kind = type(module).train
    return kind is nn.Module.train or (kind is PreTrainedModel.train and not getattr(module, "use_kernels", False))
