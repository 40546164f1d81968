"""
Write a page of decoded examples: what a run kept and dropped of each corner of the plane, and the tokens it pruned.

```bash
qtuning sft --config recipes/lab/smollm2_examples.yaml
python docs/make_examples.py runs/smollm2-examples --data "word problems of our own" --each 2 \
    --output docs/examples_smollm2.md
```
"""

import argparse
import html
import re
import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from qtuning_trl.records.samples import KEPT_MASK, SAMPLE_ID, RecordReader

# Heading, what it says of the cell, and which rows of the record belong to it.
CELLS = (
    ("Q2, kept", "High perplexity, low entropy: confidently wrong. Their tokens are pruned.",
     lambda row: row["quadrant"] == 2 and row["kept"]),
    ("Q4, kept", "Low perplexity, high entropy: right, but unsure. Kept whole.",
     lambda row: row["quadrant"] == 4 and row["kept"]),
    ("The fill, kept", "Neither Q2 nor Q4, kept to reach the budget; pruned if nearer to Q2's side.",
     lambda row: row["reason"] == "fill"),
    ("Q2 and Q4, trimmed", "Dropped to meet the budget.", lambda row: row["reason"] == "trim"),
    ("Q1, dropped", "High perplexity, high entropy: noise, or too hard.",
     lambda row: row["quadrant"] == 1 and not row["kept"]),
    ("Q3, dropped", "Low perplexity, low entropy: known already.",
     lambda row: row["quadrant"] == 3 and not row["kept"]),
    ("Between the thresholds, dropped", "In no corner.", lambda row: row["quadrant"] == 0 and not row["kept"]),
)  # fmt: skip


def pieces(tokenizer: Any, ids: np.ndarray, kept: Sequence[bool]) -> list[tuple[str, bool]]:
    """The text of the tokens in pieces that were kept or pruned; it is decoded as a whole, so that spaces are right."""
    found: list[tuple[str, bool]] = []
    done = 0
    for end, keep in enumerate(kept, start=1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            continue  # a character that the next token completes
        found.append((text[done:], bool(keep)))
        done = len(text)
    return [("".join(text for text, _ in run), keep) for keep, run in groupby(found, key=lambda piece: piece[1])]


def escaped(text: str) -> str:
    """Text for a Markdown paragraph, in which line breaks are shown as a sign."""
    text = html.escape(text, quote=False).replace("\n", " ⏎ ")
    return re.sub(r"([\\`*$~\[\]])", r"\\\1", text)


def struck(text: str) -> str:
    """Escaped text struck through: by `<del>`, since Markdown does not read `~~` between a word and a comma."""
    before, inner, after = re.fullmatch(r"(\s*)(.*?)(\s*)", text, re.DOTALL).groups()
    return f"{before}<del>{inner}</del>{after}" if inner else "<del>␣</del>"


def paragraph(text: str) -> str:
    """A quoted paragraph of lines of at most 120 characters, none of which begins a list or a heading."""
    lines = textwrap.wrap(" ".join(text.split()), 117, break_long_words=False, break_on_hyphens=False)
    lines = [re.sub(r"^(\d*)([-+#.)])(?=[#\s]|$)", r"\1\\\2", line) for line in lines]
    return "\n".join(f"> {line}" for line in lines)


def example(row: dict[str, Any], ids: np.ndarray, answer: np.ndarray, tokenizer: Any) -> str:
    """One sample: its place, its prompt, and its answer, in which pruned tokens are struck through."""
    start = int(answer.argmax())
    kept = np.ones(len(ids), dtype=bool)
    if row[KEPT_MASK] is not None:
        kept[answer] = row[KEPT_MASK]
    found = pieces(tokenizer, ids[start:], kept[start:])
    text = "".join(escaped(piece) if keep else struck(escaped(piece)) for piece, keep in found)
    tokens = f"{row['kept_tokens']} of {row['answer_tokens']} answer tokens kept" if row["kept"] else "dropped"
    where = f"Q{row['quadrant']}" if row["quadrant"] else "no corner"
    head = f"**Row {row[SAMPLE_ID]}** ({where}; perplexity {row['perplexity']:.2f}, entropy {row['entropy']:.2f} nats; "
    prompt = escaped(tokenizer.decode(ids[:start], skip_special_tokens=True)).strip()
    return f"{head}{tokens})\n\n{paragraph(prompt)}\n>\n{paragraph(text)}\n"


def page(run: str | Path, data: str, last_step: int, each: int) -> str:
    """
    The page as Markdown.

    Args:
        run (`str` or `Path`): Output directory of a run.
        data (`str`): What the rows are, and their licence.
        last_step (`int`): The last optimizer step to take examples from.
        each (`int`): Examples of each cell, the first in the record's order: nobody chose them.

    Raises:
        `ValueError`: If the run has no record of Q-Tuning's decisions in these steps.
    """
    reader = RecordReader(run)
    rows = reader.samples().filter(pc.field("step") <= last_step).to_pylist()
    if not rows or any(row["reason"] == "pruner" for row in rows):
        raise ValueError(f"{str(run)!r} has no decisions of Q-Tuning up to step {last_step}: give another run or step.")
    tokenizer = reader.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{str(reader.folder / 'tokenizer')!r} cannot be loaded, and without it no text be read.")
    config = reader.run["config"]
    steps = "step 1" if last_step == 1 else f"steps 1 to {last_step}"
    budget = f"{100 * config['sample_ratio']:g}x{100 * config['token_ratio']:g}"
    introduction = (
        f"What Q-Tuning kept and dropped at {steps} of a run of {Path(reader.run['model']).name} on {data}: "
        f"{len(rows)} candidates, {sum(row['kept'] for row in rows)} kept, budget {budget}. The first {each} of each "
        "cell in the record's order; nobody chose them. Pruned tokens are <del>struck through</del>, ⏎ is a line "
        "break. Made by `docs/make_examples.py`, which says how in its first lines."
    )
    for_whom = "For those who want to see, in words, what the method keeps, drops and strikes out."
    parts = ["# Decoded examples", for_whom, textwrap.fill(introduction, 120)]
    texts = reader.texts(row[SAMPLE_ID] for row in rows)
    for name, meaning, belongs in CELLS:
        cell = [row for row in rows if belongs(row)]
        if cell:
            parts.append(f"## {name}: {len(cell)}\n\n{meaning}")
            parts += [example(row, *texts[row[SAMPLE_ID]], tokenizer).rstrip() for row in cell[:each]]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a page of decoded examples from a run's record.")
    parser.add_argument("run", help="output_dir of a run")
    parser.add_argument("--data", required=True, help="what the rows are, and their licence")
    parser.add_argument("--last_step", type=int, default=1, help="last optimizer step to take examples from")
    parser.add_argument("--each", type=int, default=3, help="examples of each cell")
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file")
    options = parser.parse_args()
    text = page(options.run, options.data, options.last_step, options.each)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
