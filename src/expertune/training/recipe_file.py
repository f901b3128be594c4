"""Reading a recipe: a YAML file and `key=value` overrides, with errors that name the key and the way out."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from expertune.training.errors import UserError, one_paragraph
from expertune.training.recipe import Recipe

# Keys of others, and what is said in their place here.
_INSTEAD = {
    "gradient_checkpointing": "memory says what is computed again in backward",
    "bf16": "dtype says what the weights are held in",
    "fp16": "dtype says what the weights are held in",
    "assistant_only_loss": "the loss is on responses alone wherever the data has them",
    "completion_only_loss": "the loss is on responses alone wherever the data has them",
    "max_seq_length": "max_length says where rows are cut",
}
# A run writes it into the recipe that it leaves, so that one must be readable here; it sets nothing.
VERSIONS = "versions"


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key=value` overrides laid over it.

    Args:
        path: of the file, utf-8; None takes the overrides alone. Paths in it are relative to the working directory.
        overrides: such as "learning_rate=1e-4"; the value is read as YAML.

    Raises:
        UserError: the file or a value cannot be used.
    """
    values = _read(Path(path)) if path is not None else {}
    values.pop(VERSIONS, None)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"expected an override as key=value, got {override!r}.")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"the value of {key.strip()!r} is not YAML: {one_paragraph(error)}.") from error
    return make_recipe(values, source=str(path) if path is not None else "the command line")


def make_recipe(values: Mapping[str, Any], *, source: str = "the recipe") -> Recipe:
    """A checked recipe from plain values.

    Args:
        values: by field name.
        source: where they come from, for the error.

    Raises:
        UserError: a name is unknown, a value is missing or wrong, or two of them contradict.
    """
    known = list(Recipe.model_fields)
    for key in values:
        if key not in known:
            raise UserError(f"{source}: unknown key {key!r}; {_hint(str(key), known)}")
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise UserError(f"{source}: {'; '.join(_in_words(error))}.") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As `SafeLoader`'s."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _hint(key: str, known: Sequence[str]) -> str:
    """What a key that is not known may have been meant to be."""
    if key in _INSTEAD:
        return f"{_INSTEAD[key]}."
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}."


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError as error:
        raise UserError(f"there is no recipe {str(path)!r} in {Path.cwd()}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the recipe {str(path)!r} is not text in UTF-8: {error}. Save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"the recipe {str(path)!r} cannot be read: {error.strerror}. Name a YAML file.") from error
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {str(path)!r} is not YAML: {one_paragraph(error)}. Mend that line.") from error
    if not isinstance(values, dict):
        raise UserError(
            f"the recipe {str(path)!r} holds {_kind(values)}, expected lines of `key: value`, such as "
            "`model_name_or_path: Qwen/Qwen3-30B-A3B`."
        )
    return values


def _in_words(error: ValidationError) -> list[str]:
    """Each problem that pydantic found, once a field."""
    words: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        field = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "missing":
            text = f"{field} is missing; add it"
        elif not field:
            text = problem["msg"].removeprefix("Value error, ")
        else:
            text = f"{field}: {_lower(problem['msg'])}, got {problem['input']!r}"
        words.setdefault(field, text)
    return list(words.values())


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
