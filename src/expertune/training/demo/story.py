"""The demo from its first line to its last: `run_demo`."""

import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging

import expertune
from expertune.training.demo.answers import answer, exact_match
from expertune.training.demo.model import save_untrained
from expertune.training.demo.questions import Questions, Sentence, repeating, translating, vocabulary, write_jsonl
from expertune.training.demo.stock import SLACK, Agreement, compare_with_stock
from expertune.training.errors import UserError
from expertune.training.recipe import Recipe
from expertune.training.recipe_file import make_recipe
from expertune.training.run import RunResult, run

MARK = "expertune_demo.json"
_NUM_TRAIN = 8000
_NUM_HELD_OUT = 300
_NUM_SHOWN = 8
_NUM_COMPARED = 32
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured, all on held-out questions.

    Args:
        output_dir: with everything that it wrote.
        repeats: percent of questions that the base model repeats exactly, which is what it was trained to do.
        before: percent that the base model answers in Spanish exactly.
        after: the same with the adapter.
        agreement: with stock PEFT.
    """

    output_dir: Path
    repeats: float
    before: float
    after: float
    agreement: Agreement

    def failures(self) -> list[str]:
        """What did not come out as it must, in words."""
        found = []
        if not self.after > self.before:
            found.append(
                f"the adapter did not help: {self.after:.1f} % right after it was trained, {self.before:.1f} % before"
            )
        if not self.agreement.holds:
            found.append(
                f"stock PEFT gives other logits: they differ by {self.agreement.difference:.2g}, "
                f"and float32 rounding allows {self.agreement.bound:.2g}"
            )
        return found


def run_demo(output_dir: str | Path = "runs/demo", *, seed: int = 0, console: Console | None = None) -> DemoResult:
    """Make a tiny base model, fine-tune it with Split LoRA, show what it learnt, and prove the adapter in stock PEFT.

    Args:
        output_dir: a new or empty folder, or that of an earlier demo, which is replaced.
        seed: of the data, the weights and their training.
        console: where to show it; None takes the standard output.

    Raises:
        UserError: the folder holds something else.
        RuntimeError: the score did not rise, or stock PEFT gives other logits.
    """
    with _quiet_and_single_threaded():
        result = tell(Path(output_dir), seed=seed, console=console or Console())
    if failures := result.failures():
        raise RuntimeError(f"the demo failed: {'; '.join(failures)}. Please report it.")
    return result


def tell(folder: Path, *, seed: int, console: Console, overrides: Mapping[str, Any] | None = None) -> DemoResult:
    """The whole demo, whatever comes out.

    Args:
        folder: as `output_dir` of `run_demo`.
        seed: as there.
        console: to show it on.
        overrides: laid over both recipes.
    """
    start_s = time.perf_counter()
    claim(folder, seed)
    settings = {"seed": seed, "overwrite_output_dir": True, **(overrides or {})}
    console.print(
        "A tiny mixture of experts learns to repeat sentences; then LoRA on its experts teaches it to answer in "
        "Spanish. Nothing is downloaded; it takes about half a minute on 2 CPU cores.",
        soft_wrap=True,
    )
    console.rule("1. Data, a tokenizer and a model with random weights", align="left")
    asked = _make_data(folder / "data", seed, console)
    num_parameters = save_untrained(folder / "untrained", vocabulary(), seed=seed)
    console.print(f"Qwen3-MoE, 2 layers, 8 experts, 2 for each token: {num_parameters:,} parameters", highlight=False)

    console.rule("2. The base model: full fine-tuning, to repeat what is said", align="left")
    base = run(_recipe("repeat", folder, model=folder / "untrained", settings=settings), console)
    english, spanish = [s.english for s in asked], [s.spanish for s in asked]
    before = answer(*expertune.load(str(base.weights), memory="fast"), english)
    repeats = exact_match(before, english)
    console.print(f"repeats {repeats:.1f} % of {len(asked)} held-out sentences exactly", highlight=False)

    console.rule("3. The new behaviour: Split LoRA, to answer in Spanish", align="left")
    tuned = run(_recipe("spanish", folder, model=base.weights, settings=settings), console)
    _show_losses(tuned, console)

    console.rule("4. Held-out questions, before and after", align="left")
    model, tokenizer = expertune.load(str(tuned.weights), memory="fast")
    after = answer(model, tokenizer, english)
    scores = exact_match(before, spanish), exact_match(after, spanish)
    _show_answers(asked, before, after, scores, console)

    console.rule("5. The same adapter in stock PEFT and Transformers", align="left")
    conversations = _conversations(tokenizer, asked[:_NUM_COMPARED])
    agreement = compare_with_stock(model, tokenizer, base.weights, tuned.weights, conversations)
    _show_agreement(agreement, console)
    result = DemoResult(output_dir=folder, repeats=repeats, before=scores[0], after=scores[1], agreement=agreement)
    _show_end(base, tuned, time.perf_counter() - start_s, console)
    return result


def claim(folder: Path, seed: int) -> None:
    """Make the demo's folder, or take that of an earlier demo, and mark it.

    Raises:
        UserError: something else lies there; nothing is touched.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the demo writes to the folder {str(folder)!r}, but that is a file. Move it away.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise UserError(
            f"the demo writes to {str(folder)!r}, but that folder holds files that no demo wrote. Move it away, or run "
            "the demo from another working directory."
        )
    folder.mkdir(parents=True, exist_ok=True)
    mark = {"expertune": expertune.__version__, "seed": seed}
    (folder / MARK).write_text(json.dumps(mark) + "\n", encoding="utf-8")


def _make_data(folder: Path, seed: int, console: Console) -> list[Sentence]:
    """Write the rows of both tasks and the held-out questions; returns the latter."""
    folder.mkdir(exist_ok=True)
    questions = Questions(seed)
    held_out = questions.held_out(_NUM_HELD_OUT)
    for name, task in (("repeat", repeating), ("spanish", translating)):
        write_jsonl(folder / f"{name}.jsonl", task(questions.train(_NUM_TRAIN)))
        write_jsonl(folder / f"{name}_held_out.jsonl", task(held_out))
    pair = " ".join(min(questions.held_out_pairs))
    console.print(
        f"{_NUM_TRAIN:,} generated conversations for each task. {_NUM_HELD_OUT} held-out questions: each has a pair "
        f'of words that never stands together in training, such as "{pair}".',
        highlight=False,
        soft_wrap=True,
    )
    return held_out


def _recipe(name: str, folder: Path, *, model: Path, settings: Mapping[str, Any]) -> Recipe:
    """An embedded recipe, with the paths of this demo."""
    embedded = yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))
    paths = {
        "model_name_or_path": str(model),
        "dataset_name": str(folder / "data" / f"{name}.jsonl"),
        "eval_dataset_name": str(folder / "data" / f"{name}_held_out.jsonl"),
        "output_dir": str(folder / name),
    }
    return make_recipe({**embedded, **paths, **settings}, source=f"the demo's recipe {name!r}")


def _conversations(tokenizer: Any, sentences: Sequence[Sentence]) -> list[str]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": reply}], tokenize=False
        )
        for question, reply in translating(sentences)
    ]


def _show_losses(result: RunResult, console: Console) -> None:
    losses = result.losses
    top = max(losses)
    curve = "".join(_BARS[round((len(_BARS) - 1) * loss / top)] for loss in losses)
    console.print(
        f"loss {losses[0]:.3f} {curve} {losses[-1]:.3f}, plotted in {result.output_dir / 'loss.png'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _show_answers(
    asked: Sequence[Sentence],
    before: Sequence[str],
    after: Sequence[str],
    scores: tuple[float, float],
    console: Console,
) -> None:
    """A few of the answers, right ones in green, and the scores over all questions."""
    table = Table(show_footer=True)
    table.add_column("held-out question", footer=f"exactly right in Spanish, of {len(asked)}")
    table.add_column("base model", footer=f"{scores[0]:.1f} %")
    table.add_column("with the adapter", footer=f"{scores[1]:.1f} %")
    for sentence, *given in list(zip(asked, before, after, strict=True))[:_NUM_SHOWN]:
        styled = (f"[{'green' if text == sentence.spanish else 'red'}]{escape(text)}[/]" for text in given)
        table.add_row(sentence.english, *styled)
    console.print(table)


def _show_agreement(agreement: Agreement, console: Console) -> None:
    console.print(
        f"largest difference of {agreement.num_logits:,} logits: {agreement.difference:.2g}. Allowed: "
        f"{agreement.bound:.2g}, {SLACK} times what float32 rounding alone does to stock PEFT's own logits "
        f"({agreement.rounding:.2g} from its float64). [bold]{'same' if agreement.holds else 'NOT THE SAME'}[/]",
        highlight=False,
        soft_wrap=True,
    )


def _show_end(base: RunResult, tuned: RunResult, seconds: float, console: Console) -> None:
    console.rule(f"Done in {seconds:.0f} s", align="left")
    lines = {
        "base model": base.weights,
        "adapter": tuned.weights,
        "loss plots": f"{base.output_dir / 'loss.png'}, {tuned.output_dir / 'loss.png'}",
        "recipe": tuned.output_dir / "recipe.yaml",
        "next": f"{_command()} train {tuned.output_dir / 'recipe.yaml'} r=4 output_dir={tuned.output_dir.parent}-r4",
    }
    for name, text in lines.items():
        console.print(f"{name + ':':<12}{text}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _quiet_and_single_threaded() -> Iterator[None]:
    """One thread, no warnings between the hosts, no bars for files that load at once; afterwards all as it was.

    A second thread makes products this small a third faster at best (36,000 and 48,000 tokens/s were measured), and a
    hundred times slower where another process has the core that it waits for (357 tokens/s).
    """
    num_threads, has_bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # names that the hosts changed among themselves; nobody who watches can do anything about them
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads(num_threads)
        if has_bars:
            logging.enable_progress_bar()


def _command() -> str:
    """How the user reaches this program from here."""
    if shutil.which("expertune") is not None:
        return "expertune"
    script = Path(sys.executable).with_name("expertune")
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)
