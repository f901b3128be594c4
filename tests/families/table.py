"""Write docs/models.md from a run of the proofs: `python -m tests.families.table`."""

import copy
import logging
import warnings
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import track
from transformers import PreTrainedModel

import expertune
from expertune.hosts.transformers import layout_of
from tests.families import proof
from tests.families.found import UNMARKED, Family, families
from tests.families.test_families import NO_GENERATION, OUTSIDE, RECOMPUTED, ROUNDING
from tests.families.tiny import tiny_model

_PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = """# Models

Written by `make models`, which proves each row on a tiny model of the family's own code, with Transformers
{transformers}, PEFT {peft} and torch {torch}; do not edit. The same proofs are tests (`tests/families`), for
every family that the installed Transformers has: one that a newer version brings is tested by itself.

{count} families mark their experts with Transformers' `use_experts_implementation`. **All of them are served**, and
{unmarked}, which does not.
The table says how far the walk (`native_torch`, float64) is from the host's eager code, relative to the largest
entry of each tensor, in full fine-tuning (output, and the gradient of every parameter) and with stock PEFT's
LoRA on the experts; how far one layer's experts on `grouped_mm` in float32 are from float64, in brackets the
host's own distance; whether an adapter that `add_lora` made by the usual names and `save_pretrained` wrote
gives the same output in stock PEFT (where PEFT loses a part, `add_lora` warns); whether gradient checkpointing
changes nothing; whether cached generation from a padded batch gives the host's tokens. A gate that is the
host's own function is right, but not fused.

| family | model type proven | experts | gate | full | LoRA | `grouped_mm` | adapter | checkpointing | generation |
|---|---|---|---|---|---|---|---|---|---|
"""
_TAIL = """
Refused in words, because their experts have another form than that interface's: {outside}.
"""


def row(family: Family) -> str:
    """One line of the table."""
    model = tiny_model(family)
    experts = next(iter(proof.experts_of(model).values()))
    layer = expertune.explain(expertune.optimize(copy.deepcopy(model), backend="native_torch")).layers[0]
    full, lora = proof.full_fine_tuning(model)[0], proof.lora(model)[0]
    assert max(full, lora) <= ROUNDING, family.name
    compared = proof.experts_in_float32(model, "grouped_mm").values()
    ours, theirs = (max(proof.error(result[i], result[-1]) for result in compared) for i in (0, 1))
    kind = type(experts).__name__ + (", transposed" if layout_of(experts).is_transposed else "")
    distances = (f"{full:.0e}", f"{lora:.0e}", f"{ours:.1e} ({theirs:.1e})")
    verdicts = (_adapter(model), _checkpointing(model), _generation(model))
    return f"| {' | '.join((family.name, family.model_type, kind, layer.gate, *distances, *verdicts))} |"


def _adapter(model: PreTrainedModel) -> str:
    with TemporaryDirectory() as folder:
        return "equal" if proof.by_usual_names(model, Path(folder))[0] <= ROUNDING else "PEFT loses a part"


def _checkpointing(model: PreTrainedModel) -> str:
    if not model.supports_gradient_checkpointing:
        return "has none"
    return "equal" if proof.checkpointed(model, "auto")[0] <= RECOMPUTED else "differs"


def _generation(model: PreTrainedModel) -> str:
    if not model.can_generate():
        return "has none"
    if (reason := NO_GENERATION.get(model.config.model_type)) is not None:
        return f"not compared: {reason}"
    ours, theirs = proof.generated(model)
    return "equal" if ours.sequences.equal(theirs.sequences) else "differs"


def main() -> None:
    """Prove all and write the page."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = [row(family) for family in track(families().values(), description="proving")]
    versions = {name: version(name) for name in ("transformers", "peft")} | {"torch": version("torch").split("+")[0]}
    head = _HEAD.format(count=len(rows) - len(UNMARKED), unmarked=", ".join(UNMARKED), **versions)
    _PAGE.write_text(head + "\n".join(rows) + "\n" + _TAIL.format(outside=", ".join(OUTSIDE)), encoding="utf-8")


if __name__ == "__main__":
    main()
