"""No file over 400 lines, no function over 60 (a kernel 120): what a newcomer reads in one sitting."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for part in ("src", "tests", "benchmarks", "examples") for path in (ROOT / part).rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 400, 60, 120


def _functions(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1, is_kernel


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_size(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    too_long = {
        name: length
        for name, length, is_kernel in _functions(ast.parse(text))
        if length > (MAX_KERNEL if is_kernel else MAX_FUNCTION)
    }
    assert not too_long
