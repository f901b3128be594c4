"""Checkpoints of tiny models, each written once a test process.

What imports a host is imported where it is used: pytest reads this file before it starts its workers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """`checkpoint("qwen3_moe", num_experts_per_tok=3)` is the folder of such a model."""
    from tests.hosts.models import save_tiny

    folders: dict[str, Path] = {}

    def make(model_type: str, **overrides: Any) -> Path:
        key = repr((model_type, sorted(overrides.items())))
        if key not in folders:
            folders[key] = save_tiny(model_type, tmp_path_factory.mktemp(model_type), **overrides)
        return folders[key]

    return make


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERTUNE_MOE_BACKEND", raising=False)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of each pass through the walk, so that a test knows that it did not compare stock with stock."""
    from expertune.experts import experts
    from expertune.hosts import transformers
    from expertune.memory import token_tiles

    seen: list[str] = []

    def spy(walk: Callable[..., Any]) -> Callable[..., Any]:
        def watched(x: Any, routing: Any, weight: Any, projections: Any, step: Any, **keywords: Any) -> Any:
            seen.append(step.backend.name)
            return walk(x, routing, weight, projections, step, **keywords)

        return watched

    monkeypatch.setattr(transformers, "experts", spy(experts))
    monkeypatch.setattr(token_tiles, "experts", spy(token_tiles.experts))
    return seen
