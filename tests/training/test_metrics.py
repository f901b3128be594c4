import json
from pathlib import Path

from matplotlib.image import imread

from expertune.training.metrics import Record, append_json, peak_gib, plot_losses

RECORDS = [Record(step=0, eval_loss=3.0, elapsed_s=0), Record(step=5, loss=2.5, grad_norm=1, elapsed_s=2)]


def test_a_line_a_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for record in RECORDS:
        append_json(path, record)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [Record(**line) for line in lines] == RECORDS
    assert list(lines[0]) == [
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_s",
        "peak_gib",
        "elapsed_s",
        "eval_loss",
    ]


def test_plots_both_losses(tmp_path: Path) -> None:
    def colours(records: list[Record]) -> set[tuple[float, ...]]:
        plot_losses(tmp_path / "loss.png", records)
        return {tuple(pixel) for row in imread(tmp_path / "loss.png")[:, :, :3] for pixel in row}

    def is_blue(pixel: tuple[float, ...]) -> bool:
        return pixel[2] - pixel[0] > 0.5

    def is_orange(pixel: tuple[float, ...]) -> bool:
        return pixel[0] - pixel[2] > 0.5

    both = colours([*RECORDS, Record(step=9, loss=1, elapsed_s=3)])
    assert any(map(is_blue, both))
    assert any(map(is_orange, both))
    assert not any(map(is_orange, colours(RECORDS[1:])))


def test_peak_of_this_process() -> None:
    peak = peak_gib()
    assert peak is not None
    assert 0.05 < peak < 1000
