from pathlib import Path

import pytest

from expertune.training.errors import UserError
from expertune.training.recipe_file import load_recipe

TEXT = "model_name_or_path: model\ndataset_name: data.jsonl\noutput_dir: out\n"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT + "learning_rate: 1e-4\nweight_decay: 0\nalpha_pattern: {q_proj: 1e1}\n")
    recipe = load_recipe(path)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.alpha_pattern) == (1e-4, 0, {"q_proj": 10})


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT + "r: 8\n")
    overrides = ["r=4", "target_modules=[q_proj, k_proj]", "learning_rate=3e-4", "columns={question: prompt}"]
    recipe = load_recipe(path, [*overrides, "max_length=null", "use_rslora=true", "output_dir=a=b"])
    assert (recipe.r, recipe.target_modules, recipe.learning_rate) == (4, ["q_proj", "k_proj"], 3e-4)
    assert (recipe.columns, recipe.max_length, recipe.use_rslora) == ({"question": "prompt"}, None, True)
    assert recipe.output_dir == "a=b"


def test_overrides_alone_make_a_recipe() -> None:
    assert load_recipe(None, [line.replace(": ", "=") for line in TEXT.splitlines()]).dataset_name == "data.jsonl"


def test_one_target_needs_no_brackets(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, TEXT + "target_modules: q_proj\n")).target_modules == ["q_proj"]
    assert load_recipe(write(tmp_path, TEXT), ["target_modules=all-linear"]).target_modules == "all-linear"


def test_byte_order_mark_and_versions_are_read_over(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + TEXT.encode() + b"versions: {torch: 2.13.0}\n")
    assert load_recipe(path).model_name_or_path == "model"


WRONG = {
    "near": (TEXT + "lora_r: 3\n", "unknown key 'lora_r'; did you mean '"),
    "another's": (TEXT + "gradient_checkpointing: true\n", "'gradient_checkpointing'; memory says what is computed"),
    "typing error": (TEXT + "learning_rat: 3\n", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    "far": (TEXT + "zzz: 3\n", "unknown key 'zzz'; the keys are model_name_or_path, revision"),
    "missing": ("dataset_name: x\n", "model_name_or_path is missing; add it; output_dir is missing; add it"),
    "not YAML": (TEXT + "r: [3\n", "is not YAML: .*line"),
    "a list": ("- r\n", "holds a list, expected lines of"),
    "empty": ("", "holds nothing"),
    "not utf-8": (b"\xff\xfe\x00", "is not text in UTF-8.*Save it as UTF-8"),
    "a key twice": (TEXT + "r: 3\nrank_pattern: {q_proj: 2, q_proj: 4}\n", "the key 'q_proj' is there twice.*line"),
    "a setting twice": (TEXT + "r: 3\nr: 4\n", "the key 'r' is there twice"),
    "python object": ("!!python/object/apply:os.system ['true']", "is not YAML"),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG)
def test_refuses(text: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no recipe"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("override", ["r", "=3", "r=[", "lerning_rate=3"])
def test_refuses_override(override: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        load_recipe(write(tmp_path, TEXT), [override])
