"""Reading back what `qtuning score` wrote, as rows of a record: each sample was decided about once."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import cause
from ..step.sample import IGNORE, SAMPLE_ID
from .run import THRESHOLDS

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

PRUNED = "pruned"
PARQUET_MAGIC = b"PAR1"
ANSWER_TOKENS = "answer_tokens"
NEEDED = ("perplexity", "entropy", "quadrant", "keep", "input_ids", "labels")


class ScoredReader:
    """
    A file, or a dataset on disk, that `qtuning score` wrote with all columns; rows are read when they are asked for.

    Args:
        path (`str` or `Path`): The file or folder.
        tokenizer (`str`, *optional*): Name or folder of the model that scored it, whose tokens it holds.
        group_column (`str`, *optional*): Column of the data set that groups its rows.

    Raises:
        `ValueError`: If it is no such file, in one sentence.
    """

    def __init__(self, path: str | Path, tokenizer: str | None = None, group_column: str | None = None):
        self.path, self.tokenizer_name = Path(path), tokenizer
        self.data = _open(self.path)
        columns = self.data.column_names
        missing = [name for name in NEEDED if name not in columns]
        if missing:
            raise ValueError(
                f"{str(path)!r} lacks {', '.join(f'`{name}`' for name in missing)}: give a run's `output_dir`, or what "
                "`qtuning score` wrote with `--columns all`."
            )
        if not len(self.data):
            raise ValueError(f"{str(path)!r} holds no row: score a data set that has some.")
        if tokenizer is None:
            raise ValueError(
                f"`--tokenizer` is not given and {str(path)!r} holds tokens: name the model that scored it, such as "
                "`--tokenizer Qwen/Qwen3-0.6B`."
            )
        # A file of an earlier version has not these two; then nothing is struck through.
        self.says_what_was_pruned = PRUNED in columns and ANSWER_TOKENS in columns
        grouped = group_column in columns and group_column not in ("quadrant", "group")
        self.group_column = group_column if grouped else None
        rows = np.arange(len(self.data))
        ids = np.asarray(self.data[SAMPLE_ID][:]) if SAMPLE_ID in columns else rows
        own = np.issubdtype(ids.dtype, np.integer) and len(np.unique(ids)) == len(ids)
        self.ids = ids.astype(np.int64) if own else rows
        self.row_of = {sample_id: row for row, sample_id in enumerate(self.ids.tolist())}

    def samples(self) -> "pd.DataFrame":
        """
        A row per sample with the columns of [`load_record`], in the order of the file, all of step 1.

        The thresholds are those that the quadrants imply; NaN where the file does not have both sides of each, as where
        it holds only the kept rows or they were compared in several pools.
        """
        names = ["perplexity", "entropy", "quadrant", "keep"]
        frame = self.data.select_columns(names).to_pandas()
        frame = frame.rename(columns={"keep": "kept"})
        inside = frame["quadrant"].isin([2, 4])
        frame["reason"] = np.where(
            frame["kept"] & ~inside, "fill", np.where(~frame["kept"] & inside, "trim", "quadrant")
        )
        labelled = self._labelled()
        frame["answer_tokens"] = self.data[ANSWER_TOKENS][:] if self.says_what_was_pruned else labelled
        frame["kept_tokens"] = np.where(frame["kept"], labelled, 0)
        groups = self.data[self.group_column][:] if self.group_column else [None] * len(frame)
        frame["group"] = [None if value is None else str(value) for value in groups]
        frame[SAMPLE_ID], frame["step"] = self.ids, 1
        for name, value in _thresholds(frame).items():
            frame[name] = value
        return frame

    def _labelled(self) -> list[int]:
        """Answer tokens of each row that have a label."""
        labels = (row for batch in self.data.select_columns("labels").iter(1000) for row in batch["labels"])
        return [int((np.asarray(row[1:]) != IGNORE).sum()) for row in labels]

    def texts(self, sample_ids: Iterable[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By sample id, `input_ids` and which of them belong to the answer; arrays of shape `(tokens,)`."""
        return {sample_id: (ids, answer) for sample_id, (ids, answer, _) in self._rows(sample_ids).items()}

    def masks(self, sample_ids: Iterable[int]) -> dict[int, tuple[int, list[bool]]]:
        """By sample id, step 1 and which answer tokens stayed, where stage 2 pruned some."""
        rows = self._rows(sample_ids).items()
        return {
            sample_id: (1, kept[answer].tolist()) for sample_id, (_, answer, kept) in rows if not kept[answer].all()
        }

    def _rows(self, sample_ids: Iterable[int]) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        wanted = list(sample_ids)
        rows = self.data.select([self.row_of[sample_id] for sample_id in wanted])
        found = {}
        for sample_id, row in zip(wanted, rows, strict=True):
            ids, kept = np.asarray(row["input_ids"]), np.asarray(row["labels"]) != IGNORE
            kept[:1] = False  # nothing predicts the first token
            answer = kept.copy()
            answer[np.asarray(row.get(PRUNED) or [], dtype=np.int64)] = True
            found[sample_id] = ids, answer, kept
        return found

    def tokenizer(self) -> Any:
        """
        The tokenizer of the model that scored.

        Raises:
            `ValueError`: If it cannot be loaded.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.tokenizer_name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(
                f"`--tokenizer` is {self.tokenizer_name!r}, which cannot be loaded ({cause(error)}): give the model "
                "that scored the file, by its name or folder."
            ) from None


def _open(path: Path) -> "Dataset":
    from datasets import Dataset, disable_progress_bars, enable_progress_bars, load_from_disk
    from datasets.utils.logging import is_progress_bar_enabled

    bars = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        if path.is_dir():
            return load_from_disk(path)
        with open(path, "rb") as file:
            head = file.read(64).lstrip()
        if head.startswith(PARQUET_MAGIC):
            return Dataset.from_parquet(str(path))
        if head.startswith(b"{"):
            return Dataset.from_json(str(path))
    except Exception as error:  # whatever the readers below raise at what is broken
        raise ValueError(
            f"{str(path)!r} cannot be read ({cause(error)}): give a run's `output_dir`, or what `qtuning score` wrote."
        ) from None
    finally:
        if bars:
            enable_progress_bars()
    raise ValueError(
        f"{str(path)!r} is neither Parquet nor JSON lines: give a run's `output_dir`, or what `qtuning score` wrote."
    )


def _thresholds(frame: "pd.DataFrame") -> dict[str, float]:
    """Between the quadrants on either side of each; Q1 and Q2 lie above those of the perplexity, Q1 and Q4 right."""
    found = dict.fromkeys(THRESHOLDS, float("nan"))
    if frame["kept"].all():
        return found
    for name, high in (("perplexity", (1, 2)), ("entropy", (1, 4))):
        corners = frame[frame["quadrant"] > 0]
        above = corners["quadrant"].isin(high)
        low_end, high_end = corners.loc[~above, name].max(), corners.loc[above, name].min()
        if low_end <= high_end:  # False for NaN, too
            found |= {f"{name}_low": float(low_end), f"{name}_high": float(high_end)}
    return found


def is_dataset_folder(path: str | Path) -> bool:
    """Whether a folder is what `Dataset.save_to_disk` wrote."""
    return Path(path, "state.json").is_file() and Path(path, "dataset_info.json").is_file()
