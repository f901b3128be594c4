"""torch.nn.DataParallel, in which a trainer wraps a model where it sees several GPUs and no launcher began it.

It copies modules anew for every batch, a thread a GPU. What an optimized model was given, forwards, hooks and
recordings, is of the modules that were copied, and would compute on their GPU. So it is refused in words, before the
first batch.
"""

from torch import nn

_ENTRY = "_replicate_for_data_parallel"  # by which torch copies a module


def bind(model: nn.Module) -> None:
    """Let a model refuse to be copied."""
    if _ENTRY not in vars(model):
        vars(model)[_ENTRY] = _refuse


def unbind(model: nn.Module) -> None:
    """Undo `bind`."""
    if vars(model).get(_ENTRY) is _refuse:
        del vars(model)[_ENTRY]


def _refuse() -> nn.Module:
    raise ValueError(
        "torch.nn.DataParallel cannot copy a model that expertune has optimized. Transformers' trainer takes it where "
        "several GPUs are visible and no launcher began the process: start with torchrun or accelerate launch (a "
        "process a GPU, DDP), or set CUDA_VISIBLE_DEVICES=0 to train on one."
    )
