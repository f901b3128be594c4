"""Whatever a program imports first, the same model trains the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import expertune
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.models import batch

# the package loads its hosts when a verb is first named
_OURS = "import expertune; expertune.optimize"
ORDERS = {
    "ours first": [_OURS, "import trl", "import peft", "import transformers", "import torch"],
    "ours between": ["import torch", "import transformers", _OURS, "import peft", "import trl"],
    "ours last": ["import trl", "import peft", "import transformers", "import torch", _OURS],
}
LATER = {"ours between"}  # where both of the others are
_STEP = """
import sys
from tests.hosts.adapters import lora, stock
from tests.hosts.models import batch
from tests.test_import_orders import losses
print(losses(expertune.optimize(stock(sys.argv[1], lora()), backend="native_torch")))
"""


def losses(model: torch.nn.Module) -> list[float]:
    """Before and after a step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen = []
    for _ in range(2):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, marks=pytest.mark.thorough if name in LATER else (), id=name)
        for name, order in ORDERS.items()
    ],
)
def test_the_order_of_imports_does_not_matter(checkpoint: Checkpoint, tmp_path: Path, order: list[str]) -> None:
    folder = checkpoint("qwen3_moe")
    expected = losses(expertune.optimize(stock(folder, lora()), backend="native_torch"))
    assert expected[1] != expected[0]
    program = "\n".join([*order, _STEP])
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(Path(expertune.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
