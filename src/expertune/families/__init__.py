"""Families: only what the flags of a host's experts cannot say. Most models need no file here."""

from expertune.families import gpt_oss
from expertune.families.family import Family

FAMILIES: tuple[Family, ...] = (gpt_oss.FAMILY,)


def find(model_type: str) -> Family | None:
    """The family of a `config.model_type`, or None where the flags say everything."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
