"""Write what `sft_step.py` measured into a document: tables, the parts of a step against the roofline, and plots.

    python benchmarks/step_report.py benchmarks/results/FILE.json docs/benchmarks.md [NAME]

The section stands between two lines of the document, `<!-- sft_step NAME: begin -->` and the same with `end`, and is
replaced as a whole; the plots go to `plots/` beside the document. The name is the shape's, where no other is given.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimensions import dimensions
from parts import PARTS
from roofline import Card, card_of, roofline_ms, step

_OURS, _STOCK = "expertune", "transformers"


@dataclass(frozen=True)
class Table:
    """A header and rows of as many cells; the first cell of the header says what the others are."""

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tables(report: dict[str, Any]) -> list[Table]:
    """All tables of what `sft_step.py` wrote, those of the parts last."""
    rows = {peer: {row["context"]: row for row in rows if "context" in row} for peer, rows in report["peers"].items()}
    contexts = sorted({context for by_context in rows.values() for context in by_context})
    found = [
        _by_context("ms a step (best)", rows, contexts, lambda row: f"{row['ms']:.0f} ({row['ms_min']:.0f})"),
        _by_context("tokens/s", rows, contexts, lambda row: f"{row['tokens_per_s']:,}"),
    ]
    found[0].rows.extend(_ratios(rows, contexts))
    if _has(rows, "peak_gib"):
        found.append(_by_context("peak (reserved) GiB", rows, contexts, _memory))
    if _has(rows, "idle_ms"):
        found.append(_by_context("GPU idle ms: around all, in long gaps, in short", rows, contexts, _idle))
    return [*found, _once(report, rows), *_parts(report, rows, contexts)]


def _idle(row: dict[str, Any]) -> str:
    found = row.get("idle_ms")
    return "not profiled" if found is None else " / ".join(f"{found[kind]:.1f}" for kind in ("around", "long", "short"))


def _has(rows: dict[str, dict[int, Any]], key: str) -> bool:
    return any(key in row for by_context in rows.values() for row in by_context.values())


def _by_context(title: str, rows: dict[str, dict[int, Any]], contexts: list[int], cell: Callable[[Any], str]) -> Table:
    def text(row: dict[str, Any] | None) -> str:
        if row is None:
            return "did not run"
        return "out of memory" if row["ms"] is None else cell(row)

    body = [[peer, *(text(by_context.get(context)) for context in contexts)] for peer, by_context in rows.items()]
    return Table([title, *(f"{context:,}" for context in contexts)], body)


def _memory(row: dict[str, Any]) -> str:
    return f"{row['peak_gib']:.1f} ({row['reserved_gib']:.1f})"


def _ratios(rows: dict[str, dict[int, Any]], contexts: list[int]) -> list[list[str]]:
    """How often the median of each of ours goes into that of each other peer."""
    ours = [peer for peer in rows if peer.startswith(_OURS)]

    def ratio(other: str, mine: str, context: int) -> str:
        theirs, own = (rows[peer].get(context, {}).get("ms") for peer in (other, mine))
        return f"{theirs / own:.2f}x" if theirs and own else ""

    pairs = [(other, mine) for other in rows if other not in ours for mine in ours]
    return [[f"{other} / {mine}", *(ratio(other, mine, c) for c in contexts)] for other, mine in pairs]


def _once(report: dict[str, Any], rows: dict[str, dict[int, Any]]) -> Table:
    """What there is once a peer: its very first step, its longest context, how far its losses lie from stock's."""
    body = []
    for peer, by_context in rows.items():
        first = next((row["first_step_ms"] for row in by_context.values() if row["ms"] is not None), None)
        longest = next((row["longest"] for row in report["peers"][peer] if "longest" in row), None)
        apart = _losses_apart(by_context, rows.get(_STOCK, {}))
        body.append(
            [
                peer,
                "" if first is None else f"{first / 1000:.1f}",
                "not looked for" if longest is None else f"{longest:,}",
                "" if apart is None or peer == _STOCK else f"{apart:.4f}",
            ]
        )
    return Table(["", "first step, s", "longest context", f"losses from those of {_STOCK}, at most"], body)


def _losses_apart(mine: dict[int, Any], stock: dict[int, Any]) -> float | None:
    shared = [context for context in mine if mine[context].get("loss") and stock.get(context, {}).get("loss")]
    pairs = [pair for context in shared for pair in zip(mine[context]["loss"], stock[context]["loss"], strict=True)]
    return max((abs(a - b) for a, b in pairs), default=None)


def rooflines(report: dict[str, Any], contexts: list[int]) -> dict[int, dict[str, float]] | None:
    """Milliseconds of each part at each context; None where it is not known."""
    card = _card(report)
    if card is None:
        return None
    model = dimensions(report["shape"], report["layers"])
    return {context: roofline_ms(step(model, context, report["rank"]), card) for context in contexts}


def _card(report: dict[str, Any]) -> Card | None:
    """The card, if the roofline is known on it: not of several samples a batch, which depends on their lengths."""
    return card_of(report["provenance"]["device"]) if _rows(report) == "whole" else None


def _rows(report: dict[str, Any]) -> str:
    """What a batch is made of; of reports from before there was a choice, too."""
    return str(report.get("rows", "whole"))


def _parts(report: dict[str, Any], rows: dict[str, dict[int, Any]], contexts: list[int]) -> list[Table]:
    """A table a peer: milliseconds of the GPU, the roofline's, and their ratio."""
    roofs, found = rooflines(report, contexts), []

    def cell(row: dict[str, Any], context: int, parts: tuple[str, ...]) -> str:
        if "part_ms" not in row:
            return ""
        ms = sum(row["part_ms"][part] for part in parts)
        roof = sum(roofs[context][part] for part in parts) if roofs else 0
        return f"{ms:.1f} / {roof:.1f} ({ms / roof:.1f}x)" if roof else f"{ms:.1f}"

    for peer, by_context in rows.items():
        if not _has({peer: by_context}, "part_ms"):
            continue
        lines = [(part, (part,)) for part in PARTS] + [("together", PARTS)]
        body = [[name, *(cell(by_context.get(c, {}), c, parts) for c in contexts)] for name, parts in lines]
        measure = "GPU ms / roofline ms (ratio)" if roofs else "GPU ms"
        found.append(Table([f"{peer}: {measure}", *(f"{context:,}" for context in contexts)], body))
    return found


def plot(report: dict[str, Any], path: Path) -> None:
    """Milliseconds and peak memory over the context, a line a peer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5))
    for axes, key, label in zip(figure.subplots(1, 2), ("ms", "peak_gib"), ("ms a step", "peak GiB"), strict=True):
        for peer, rows in report["peers"].items():
            points = [(row["context"], row[key]) for row in rows if row.get(key) is not None]
            axes.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", label=peer)
        contexts = sorted({row["context"] for rows in report["peers"].values() for row in rows if "context" in row})
        axes.set(xscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.suptitle(title(report))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def plot_parts(report: dict[str, Any], path: Path) -> bool:
    """The GPU's milliseconds by part as bars, the roofline's first; False, and no file, where no part was measured."""
    from matplotlib.figure import Figure

    bars: dict[int, dict[str, dict[str, float]]] = {}
    for peer, rows in report["peers"].items():
        for row in rows:
            if "part_ms" in row:
                bars.setdefault(row["context"], {})[peer] = row["part_ms"]
    if not bars:
        return False
    roofs = rooflines(report, list(bars)) or {}
    figure = Figure(figsize=(1 + 2.6 * len(bars), 4.5))
    (all_axes,) = figure.subplots(1, len(bars), squeeze=False)
    for axes, (context, peers) in zip(all_axes, sorted(bars.items()), strict=True):
        columns = ({"roofline": roofs[context]} if roofs else {}) | peers
        bottom = [0.0] * len(columns)
        for part in PARTS:
            heights = [parts[part] for parts in columns.values()]
            axes.bar(list(columns), heights, bottom=bottom, label=part)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axes.set(title=f"{context:,} tokens", ylabel="GPU ms a step")
        axes.tick_params(axis="x", rotation=60)
    all_axes[0].legend(fontsize="small", loc="upper left")
    figure.suptitle(title(report))
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return True


def title(report: dict[str, Any]) -> str:
    """The shape, its layers and rank, and the adapters' dtype and the rows where they are not what is usual."""
    dtype = report.get("adapter_dtype", "float32")
    narrow = "" if dtype == "float32" else f" in {dtype}"
    several = "" if _rows(report) == "whole" else f", {_rows(report)} samples"
    return f"SFT step, {report['shape']} shape, {report['layers']} layers, r={report['rank']}{narrow}{several}"


def section(report: dict[str, Any], raw: str, plots: list[str]) -> str:
    """The section in Markdown.

    Args:
        report: what `sft_step.py` wrote.
        raw, plots: where its file and the plots lie, as the document links them.
    """
    where = dict(report["provenance"])
    machine, day, commit, remark = (where.pop(key, None) for key in ("device", "date", "commit", "what"))
    versions = ", ".join(f"{package} {version}" for package, version in where.items() if version)
    batch = "one row for each 512 tokens" if _rows(report) == "padded" else "batch 1"
    pieces = [
        f"### {title(report)}",
        f"{machine}, {day}, commit {commit}; {versions}. {report['steps']} steps a context or more, {batch}, bf16; "
        f'expertune with `memory="{report["memory"]}"` where its name says no other, adapters in '
        f"{report.get('adapter_dtype', 'float32')}, and {report['adam']}'s 8-bit AdamW; the others with gradient "
        f"checkpointing and bitsandbytes'. [Raw]({raw})",
        *([remark] if remark else []),
        *(table.markdown() for table in tables(report)),
        *_about_the_roofline(report),
        *(f"![{title(report)}]({plot})" for plot in plots),
    ]
    return "\n\n".join(pieces)


def _about_the_roofline(report: dict[str, Any]) -> list[str]:
    card = _card(report)
    if card is None or not any("part_ms" in row for rows in report["peers"].values() for row in rows):
        return []
    return [
        f"Roofline: forward and backward with nothing computed twice, at {card.tflops:.0f} TFLOP/s and {card.tb_s} "
        "TB/s (`benchmarks/roofline.py`). The head's products count to the dense ones, and so does what PEFT "
        "multiplies to add `BA` to the weights; clipping counts to the optimizer."
    ]


def replaced(document: str, name: str, text: str) -> str:
    """The document with this text between the two lines of this name.

    Raises:
        ValueError: the lines are not there, once each and in order.
    """
    begin, end = (f"<!-- sft_step {name}: {word} -->" for word in ("begin", "end"))
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end) or begin in after or end in after:
        raise ValueError(f"the document must hold these lines once, where the section belongs:\n{begin}\n{end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def write(results: Path, document: Path, name: str | None = None) -> None:
    """Put the section and the plots of a results file into a document, under this name or its shape's."""
    report = json.loads(results.read_text(encoding="utf-8"))
    name = name or report["shape"]
    folder = document.parent / "plots"
    folder.mkdir(exist_ok=True)
    lines, parts = folder / f"sft-step-{name}.png", folder / f"sft-step-{name}-parts.png"
    plot(report, lines)
    drawn = [lines, parts] if plot_parts(report, parts) else [lines]
    raw, *plots = (Path(os.path.relpath(path, document.parent)).as_posix() for path in (results, *drawn))
    text = replaced(document.read_text(encoding="utf-8"), name, section(report, raw, plots))
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    write(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
