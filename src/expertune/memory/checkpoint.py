"""Gradient checkpointing of one layer: keep its input, compute the rest again in backward.

torch has two ways. The reentrant one runs the first forward without autograd and saves through no hook, which costs the
CPU far less than the other. But it hides a layer's parameters from whoever asks autograd for their gradients, carries
none where no positional tensor requires one, and runs again with whatever the layer holds by then. This is a node of
its own that is as cheap: the parameters are among its inputs, and the layer runs again as it ran. The other way of
torch's is taken where gradients come through keywords, by `torch.compile`, which knows it alone, and beside other
processes: whoever shards parameters puts others in their place while a layer runs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from expertune.memory.random_states import RandomStates

As: TypeAlias = Callable[[], AbstractContextManager[None]]


class LayerCheckpoint:
    """Of one layer; called as torch's `checkpoint` is.

    Args:
        layer: the layer.
        note: of the layer's modules, before it runs: gives what puts their settings as they are then around its second
            run.
    """

    def __init__(self, layer: nn.Module, note: Callable[[Sequence[nn.Module]], As] | None = None) -> None:
        self._layer = layer
        self._note = note

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function(*args, **kwargs)` and keep nothing but its inputs until backward.

        Args:
            function: the layer's forward; keywords bound to it by `functools.partial` count as keywords.
            args: its positional inputs, tensors or not.
            kwargs: its keyword inputs.
        """
        keywords = kwargs | (function.keywords if isinstance(function, partial) else {})
        if torch.compiler.is_compiling() or _is_one_of_many() or _any_requires_grad(_but_tensors(args, keywords)):
            return self.by_torch(function, *args, **kwargs)
        bound = partial(function, **kwargs)
        if not torch.is_grad_enabled():
            return bound(*args)
        modules = _modules(self._layer)
        call = _Call(bound, args, _Held(modules), self._noted(modules))
        inputs = [*call.tensors_of(args), *call.held.trained]
        if not any(each.requires_grad for each in inputs):  # it may still reach what does
            return self.by_torch(function, *args, **kwargs)
        return _Checkpointed.apply(call, *inputs)  # type: ignore[no-untyped-call]

    def by_torch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same by torch's checkpoint that is not reentrant, which carries gradients past what a layer returns.

        Beside other processes parameters are those that the layer has when it runs again, and adapters as noted.
        """
        bound = partial(function, **kwargs)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return checkpoint(bound, *args, use_reentrant=False)
        modules = _modules(self._layer)
        held, as_noted = None if _is_one_of_many() else _Held(modules), self._noted(modules)

        @contextmanager
        def again() -> Iterator[None]:
            with nullcontext() if held is None else held.again({each: each for each in held.trained}), as_noted():
                yield

        return checkpoint(bound, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _EachTime(again)))

    def _noted(self, modules: Sequence[nn.Module]) -> As:
        return nullcontext if self._note is None else self._note(modules)


class _EachTime(ExitStack):
    """A context for whoever enters it more than once: a layer runs again in each backward of a graph that is kept.

    Args:
        make: what is entered each time.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self._make = make

    def __enter__(self) -> "_EachTime":
        self.enter_context(self._make())
        return self


class _Held:
    """The parameters and buffers of a layer when it first runs.

    Args:
        modules: of the layer.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        dicts: list[dict[str, Any]] = [
            held for module in modules for held in (module._parameters, module._buffers) if held
        ]
        self._tensors = [(held, name, tensor) for held in dicts for name, tensor in held.items() if tensor is not None]
        self.trained = list(dict.fromkeys(tensor for _, _, tensor in self._tensors if tensor.requires_grad))

    @contextmanager
    def again(self, instead: dict[Tensor, Tensor]) -> Iterator[None]:
        """They, or others instead of those that are trained, where they were, wanted or not as then."""
        places = [(held, name, instead.get(tensor, tensor)) for held, name, tensor in self._tensors]
        moved = [(held, name, tensor) for held, name, tensor in places if held.get(name) is not tensor]
        others = [held.get(name) for held, name, _ in moved]
        turned = {tensor for _, _, tensor in self._tensors if tensor.requires_grad is not (tensor in instead)}
        try:
            for held, name, tensor in moved:
                held[name] = tensor
            for tensor in turned:
                tensor.requires_grad_(not tensor.requires_grad)
            yield
        finally:
            for tensor in turned:
                tensor.requires_grad_(not tensor.requires_grad)
            for (held, name, _), other in zip(moved, others, strict=True):
                held[name] = other


class _Call:
    """One call of a layer, to be run again as it ran.

    Args:
        function: the layer's forward.
        args: its positional inputs, of which the tensors are kept elsewhere.
        held: by the layer.
        as_noted: around its second run.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], held: _Held, as_noted: As) -> None:
        self._function, self.held, self._as_noted = function, held, as_noted
        self._places = [place for place, arg in enumerate(args) if isinstance(arg, Tensor)]
        self._args = [None if isinstance(arg, Tensor) else arg for arg in args]
        self._random = RandomStates.now(args)
        devices = dict.fromkeys(["cpu", *(tensor.device.type for tensor in self.tensors_of(args))])
        self._autocasts = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
        self._caches = torch.is_autocast_cache_enabled()

    def tensors_of(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors among the positional inputs."""
        return [args[place] for place in self._places]

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """The layer, on these in place of its tensors."""
        args = list(self._args)
        for place, tensor in zip(self._places, tensors, strict=True):
            args[place] = tensor
        return self._function(*args)

    def run_again(self, tensors: Sequence[Tensor], trained: Sequence[Tensor]) -> Any:
        """The same with autograd, on these in place of its trained parameters, and with all else as it was."""
        with ExitStack() as around:
            around.enter_context(torch.random.fork_rng(self._random.devices))
            self._random.restore()
            for device, is_enabled, dtype in self._autocasts:
                around.enter_context(torch.autocast(device, dtype, is_enabled, self._caches))
            around.enter_context(self.held.again(dict(zip(self.held.trained, trained, strict=True))))
            around.enter_context(self._as_noted())
            around.enter_context(torch.enable_grad())
            return self.run(tensors)


class _Checkpointed(torch.autograd.Function):
    """A layer as a function of its tensors and its trained parameters."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> Any:
        tensors = inputs[: len(inputs) - len(call.held.trained)]
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return call.run(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        wants = ctx.needs_input_grad[1:]
        tensors = [x.detach().requires_grad_(want) for x, want in zip(ctx.saved_tensors, wants, strict=False)]
        is_whole: bool = torch.autograd._is_checkpoint_valid()  # type: ignore[no-untyped-call]
        # then the layer's own backward may add to `.grad` at once, and experts in place (`accumulate.py`)
        theirs = call.held.trained
        adds_itself = is_whole and not any(map(_is_watched, theirs))
        trained = theirs if adds_itself else [each.detach().requires_grad_() for each in theirs]
        out = call.run_again(tensors, trained)
        outs = out if isinstance(out, tuple) else (out,)
        ends = [(o, dout) for o, dout in zip(outs, douts, strict=True) if dout is not None and o.requires_grad]
        if not ends:
            return (None, *[None] * len(wants))
        reached, of_reached = zip(*ends, strict=True)
        edges = [get_gradient_edge(o) for o in reached]
        wanted = [] if is_whole else [*(x for x in tensors if x.requires_grad), *trained]
        if not is_whole:
            _refuse_others(reached, wanted)
        del out, outs, ends, reached  # nobody reads what came out a second time
        if is_whole:
            torch.autograd.backward(edges, of_reached)
            return (None, *[x.grad for x in tensors], *[None if adds_itself else each.grad for each in trained])
        grads = iter(torch.autograd.grad(edges, wanted, of_reached, allow_unused=True))
        return (None, *[next(grads) if x.requires_grad else None for x in tensors], *grads)


def _refuse_others(ends: Iterable[Tensor], known: Iterable[Tensor]) -> None:
    """Refuse a layer that reaches leaves beyond these: a pass that hands gradients out gets none of theirs from it.

    Raises:
        RuntimeError: it does.
    """
    ours, seen, to_visit = set(map(id, known)), set(), [end.grad_fn for end in ends]
    while to_visit:
        node = to_visit.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        to_visit.extend(made_of for made_of, _ in node.next_functions)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ours:
            raise RuntimeError(
                "a layer reads a tensor that requires a gradient and is no parameter of it. Where the layer runs again "
                "in backward, autograd.grad and backward(inputs=…) cannot reach it. Make it a parameter of the layer, "
                "or use memory='fast'."
            )


def _modules(module: nn.Module) -> list[nn.Module]:
    """All in it and itself, in half the time that `modules()` takes; one that is there twice comes twice."""
    found = [module]
    for each in found:
        found.extend(inner for inner in each._modules.values() if inner is not None)
    return found


def _is_watched(tensor: Tensor) -> bool:
    """Whether hooks lie on a parameter, which see its gradient once, or it is no leaf and has a backward of its own."""
    has_hooks = bool(tensor._backward_hooks) or bool(getattr(tensor, "_post_accumulate_grad_hooks", None))
    return has_hooks or not tensor.is_leaf


def _is_one_of_many() -> bool:
    """Whether other processes may wait for gradients of this one."""
    return distributed.is_available() and distributed.is_initialized()


def _but_tensors(args: Iterable[Any], keywords: dict[str, Any]) -> list[Any]:
    """All inputs but tensors that are positional, whose gradients the node carries."""
    return [*(arg for arg in args if not isinstance(arg, Tensor)), *keywords.values()]


def _any_requires_grad(values: Iterable[Any], depth: int = 5) -> bool:
    """Whether a tensor that requires a gradient is among the values, or in what they hold: items or attributes.

    A cache of keys and values, for instance, holds layers that hold tensors.
    """
    for value in values:
        held: Iterable[Any] = ()
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, dict):
            held = value.values()
        elif isinstance(value, tuple | list):
            held = value
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
            held = vars(value).values()
        if held and depth and _any_requires_grad(held, depth - 1):
            return True
    return False
