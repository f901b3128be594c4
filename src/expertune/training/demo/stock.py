"""The proof that the adapter is PEFT's own: loaded there, without expertune, it gives the same logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

# Each of the two models is off the truth by its own rounding, so they may differ by twice that. Four times again,
# because they sum in another order: stock PEFT folds the adapter into the weight first. Six seeds gave 0.4 to 1.9 in
# all; one expert's factor that is wrong by a thousandth gives more than 8.
SLACK = 8


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the logits of expertune and of stock PEFT lie apart, and how far rounding allows.

    Args:
        difference: the largest between the two, both in float32.
        rounding: the largest of stock in float32 from stock in float64: what float32 does to these very numbers.
        num_logits: compared.
    """

    difference: float
    rounding: float
    num_logits: int

    @property
    def bound(self) -> float:
        """The largest difference that float32 rounding allows."""
        return SLACK * self.rounding

    @property
    def holds(self) -> bool:
        """Whether the two are the same function; false too when a logit is not a number."""
        return self.difference <= self.bound


def compare_with_stock(
    model: Any, tokenizer: PreTrainedTokenizerBase, base: Path, adapter: Path, texts: Sequence[str]
) -> Agreement:
    """Load base and adapter with Transformers and PEFT alone, and compare the logits at every token of the texts.

    Args:
        model: the same base and adapter, through expertune.
        tokenizer: of the base.
        base: its folder.
        adapter: the adapter's folder.
        texts: whole conversations.
    """
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    stock = _load_stock(base, adapter, dtype=torch.float32)
    # torch's grouped matmul, which Transformers would choose, has no float64
    exact = _load_stock(base, adapter, dtype=torch.float64, experts_implementation="eager")
    ours, theirs, truth = (_logits(m, batch) for m in (model, stock.to(model.device), exact.to(model.device)))
    return Agreement(
        difference=(ours - theirs).abs().max().item(),
        rounding=(theirs - truth).abs().max().item(),
        num_logits=ours.numel(),
    )


def _load_stock(base: Path, adapter: Path, **settings: Any) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **settings), adapter)


@torch.inference_mode()
def _logits(model: Any, batch: Any) -> Tensor:
    """In float64, so that the comparison itself rounds nothing; padding left out."""
    model.eval()
    logits: Tensor = model(**batch).logits
    return logits[batch["attention_mask"].bool()].double()
