"""Results become a section of a document, the same one each time."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dimensions import dimensions
from parts import PARTS
from roofline import CARDS, roofline_ms, step
from step_report import replaced, section, tables, write

ROOT = Path(__file__).parents[2]

MARKED = "before\n<!-- sft_step {0}: begin -->\nold\n<!-- sft_step {0}: end -->\nafter\n"


def row(context: int, ms: float | None, **more: Any) -> dict[str, Any]:
    if ms is None:
        return {"context": context, "ms": None}
    gib = {"peak_gib": 20.0, "reserved_gib": 21.5}
    measured = {"context": context, "ms": ms, "ms_min": ms - 1, "first_step_ms": 1000 * ms}
    return measured | {"tokens_per_s": round(1000 * context / ms), "loss": [12.0, 11.5]} | gib | more


def report(device: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    peers = {
        "transformers": [row(1024, 200.0), row(4096, None)],
        "expertune": [
            row(1024, 50.0, loss=[12.0, 11.5125], part_ms=dict.fromkeys(PARTS, 8.0)),
            row(4096, 80.0, part_ms=dict.fromkeys(PARTS, 16.0)),
            {"longest": 65536},
        ],
        "unsloth": [],
    }
    settings = {"shape": "qwen3", "layers": 12, "rank": 64, "memory": "auto", "adam": "expertune", "steps": 10}
    return {"provenance": {"device": device, "commit": "abc1234", "torch": "2.11.0"}, **settings, "peers": peers}


def test_the_tables_say_what_was_measured() -> None:
    speed, tokens, memory, once, _ = (table.rows for table in tables(report()))
    assert speed == [
        ["transformers", "200 (199)", "out of memory"],
        ["expertune", "50 (49)", "80 (79)"],
        ["unsloth", "did not run", "did not run"],
        ["transformers / expertune", "4.00x", ""],
        ["unsloth / expertune", "", ""],
    ]
    assert tokens[1] == ["expertune", "20,480", "51,200"]
    assert memory[1] == ["expertune", "20.0 (21.5)", "20.0 (21.5)"]
    assert once == [
        ["transformers", "200.0", "not looked for", ""],
        ["expertune", "50.0", "65,536", "0.0125"],
        ["unsloth", "", "not looked for", ""],
    ]


def test_a_table_says_where_the_gpu_waited() -> None:
    measured = report()
    measured["peers"]["expertune"][0]["idle_ms"] = {"around": 1.25, "short": 0.5, "long": 3.0, "longest": []}
    by_header = {table.header[0]: table.rows for table in tables(measured)}
    waits = by_header["GPU idle ms: around all, in long gaps, in short"]
    assert waits[0] == ["transformers", "not profiled", "out of memory"]
    assert waits[1] == ["expertune", "1.2 / 3.0 / 0.5", "not profiled"]


def test_parts_stand_against_their_roofline() -> None:
    table = tables(report())[-1]
    assert table.header == ["expertune: GPU ms / roofline ms (ratio)", "1,024", "4,096"]
    roof = roofline_ms(step(dimensions("qwen3", 12), 4096, 64), CARDS["H100 80GB HBM3"])
    for part, line in zip(PARTS, table.rows, strict=False):
        assert line[0] == part
        assert line[2] == f"16.0 / {roof[part]:.1f} ({16 / roof[part]:.1f}x)"
    together = sum(roof.values())
    assert table.rows[-1][2] == f"80.0 / {together:.1f} ({80 / together:.1f}x)"


def test_a_card_without_ceilings_has_no_roofline() -> None:
    table = tables(report("NVIDIA A100-SXM4-80GB"))[-1]
    assert table.header[0] == "expertune: GPU ms"
    assert table.rows[0] == ["optimizer", "8.0", "16.0"]


def test_only_what_stands_between_the_lines_is_replaced() -> None:
    assert replaced(MARKED.format("qwen3"), "qwen3", "new") == MARKED.format("qwen3").replace("old", "new")
    with pytest.raises(ValueError, match="sft_step gptoss: begin"):
        replaced(MARKED.format("qwen3"), "gptoss", "new")
    with pytest.raises(ValueError, match="once"):
        replaced(2 * MARKED.format("qwen3"), "qwen3", "new")


@pytest.mark.parametrize("has_parts", [True, False])
def test_a_second_time_changes_nothing(has_parts: bool, tmp_path: Path) -> None:
    results, document = tmp_path / "results.json", tmp_path / "docs" / "document.md"
    written = report()
    if not has_parts:  # as on a CPU
        written["peers"]["expertune"] = [row(1024, 50.0), row(4096, 80.0)]
    results.write_text(json.dumps(written))
    document.parent.mkdir()
    document.write_text(MARKED.format(written["shape"]))

    def files() -> dict[str, bytes]:
        write(results, document)
        return {path.name: path.read_bytes() for path in document.parent.rglob("*.*")}

    first = files()
    assert files() == first
    plots = ["sft-step-qwen3-parts.png", "sft-step-qwen3.png"] if has_parts else ["sft-step-qwen3.png"]
    assert sorted(first) == ["document.md", *plots]
    text = document.read_text()
    assert "| expertune" in text
    assert "[Raw](../results.json)" in text
    for plot in plots:
        assert f"(plots/{plot})" in text


def test_a_name_keeps_two_results_of_a_shape_apart(tmp_path: Path) -> None:
    results, document = tmp_path / "results.json", tmp_path / "document.md"
    results.write_text(json.dumps(report() | {"adapter_dtype": "bfloat16"}))
    document.write_text(MARKED.format("qwen3") + MARKED.format("qwen3_lean"))
    write(results, document, "qwen3_lean")
    text = document.read_text()
    assert text.startswith(MARKED.format("qwen3"))
    assert "adapters in bfloat16" in text
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "sft-step-qwen3_lean-parts.png",
        "sft-step-qwen3_lean.png",
    ]


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_several_samples_have_no_roofline(rows: str) -> None:
    text = section(report() | {"rows": rows}, "raw.json", [])
    assert f"{rows} samples" in text
    assert "oofline" not in text
    assert "oofline" in section(report(), "raw.json", [])


def test_the_committed_section_is_that_of_its_results() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for _, body in re.findall(r"<!-- sft_step (\w+): begin -->\n(.*?)\n<!-- sft_step \1: end -->", text, re.DOTALL):
        (raw,) = re.findall(r"\[Raw\]\((.*)\)", body)
        plots = re.findall(r"\((plots/.*\.png)\)", body)
        assert section(json.loads((ROOT / "docs" / raw).read_text()), raw, plots) == body
        assert all((ROOT / "docs" / plot).is_file() for plot in plots)
