"""
The record: what each optimizer step decided about each sample, in Parquet, while the run goes on; and reading it back.

    <output_dir>/_qtuning_record/
        run.json                            the run: processes, steps, data set, configuration, versions
        logs.jsonl                          what was logged: a line each (process 0)
        tokenizer/                          so that texts can be read without the model
        part-<process>-<first>-<last>/      the steps `first` to `last` of one process, never changed afterwards
            samples.parquet                 a row per scored sample and step
            steps.parquet                   a row per step: counts and seconds (process 0)
            texts.parquet                   the tokens of each sample, in the part in which it was seen first

A part is written under a hidden name and renamed, so a killed run leaves whole parts only. It is on the disk before the
checkpoint of its last step, so a resumed run cuts what lies beyond its checkpoint and leaves neither gap nor double.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState

from ..step.sample import IGNORE, KEPT_MASK, SAMPLE_ID, Sample, answer_lengths
from .parts import SAMPLES, STEPS, TABLES, TEXTS, Part, cut_after, list_parts, read_table, write_part, write_whole
from .run import QUADRANTS, THRESHOLDS, RunRecord, group_columns, run_summary

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from ..config import QTuningSFTConfig
    from ..step.selection import Group

RECORD_NAME = "_qtuning_record"  # transformers pushes no file whose path begins with `_`, and this holds texts
LOGS_NAME = "logs.jsonl"
FORMAT = 1
# A part is written when a checkpoint is due, and when one of these is reached: at most this much is lost in a kill.
FLUSH_SECONDS = 30.0
FLUSH_ROWS = 20_000
# Texts are for people to read: of a larger training set a process records those that it sees first.
MAX_TEXT_TOKENS = 32_000_000

logger = logging.getLogger(__name__)

REASONS = ("quadrant", "fill", "trim")


# Writing


class SampleRecorder(TrainerCallback):
    """
    Appends what each step decided to the record in the output directory.

    The trainer hands over each group of candidates (`add`); the end of the optimizer step completes them. It draws no
    random number and changes nothing that is trained on.

    Args:
        record (`Callable`): Returns the run's record, which knows the step's counts and seconds.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Saved with it, so that texts can be read.
        data (`Callable`): Returns the facts of the training set that are recorded: its name and its rows, as far as
            they are known.
    """

    folder: Path

    def __init__(
        self,
        record: Callable[[], RunRecord],
        tokenizer: PreTrainedTokenizerBase,
        data: Callable[[], dict[str, Any]] = dict,
    ):
        self.record, self.tokenizer, self.data = record, tokenizer, data
        self._begun = False  # an evaluation before training is logged, too
        self._seen: set[int] = set()
        self._text_tokens = 0
        self._clear()

    def _clear(self) -> None:
        self._groups: list[dict[str, Any]] = []  # of the step that is under way
        self._samples: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self._texts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._rows = 0
        self._written = time.monotonic()

    def add(self, args: "QTuningSFTConfig", group: "Group", survivors: list[Sample]) -> None:
        """
        Take in a group of scored candidates that were compared with each other.

        Args:
            args ([`QTuningSFTConfig`]): The configuration.
            group ([`Group`]): The candidates, their place on the EU plane, and what stage 1 decided about them.
            survivors (`list[Sample]`): Those it kept, in order, as stage 2 left them.
        """
        samples, decided = group.samples, group.decided
        kept = decided.keep.nonzero().flatten().tolist()
        reasons = [REASONS[code] for code in (decided.filled + 2 * decided.trimmed.int()).tolist()]
        if args.sample_pruner not in ("q_tuning", "q_tuning_code"):
            reasons = ["pruner"] * len(samples)
        kept_tokens = np.zeros(len(samples), dtype=np.int32)
        kept_tokens[kept] = answer_lengths(survivors)
        masks: list[np.ndarray | None] = [None] * len(samples)
        for index, survivor in zip(kept, survivors, strict=True):
            if is_sampled(survivor.sample_id, args.record_tokens):
                masks[index] = survivor.kept_mask
        self._groups.append(
            {
                **group_columns(group),
                "reason": reasons,
                "answer_tokens": answer_lengths(samples),
                "kept_tokens": kept_tokens.tolist(),
                "group": [None if sample.group is None else str(sample.group) for sample in samples],
                KEPT_MASK: masks,
                **{name: getattr(decided, name) for name in THRESHOLDS},
            }
        )
        for sample in samples:
            if sample.sample_id not in self._seen and self._text_tokens < MAX_TEXT_TOKENS:
                self._seen.add(sample.sample_id)
                self._text_tokens += len(sample)
                answer = sample.labels != IGNORE
                answer[:1] = False  # nothing predicts the first token
                self._texts[sample.sample_id] = sample.input_ids.astype(np.int32), answer

    # Events of the trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.folder, self._begun = Path(args.output_dir, RECORD_NAME), True
        self.process = args.process_index
        self._clear()
        self._seen, self._text_tokens = set(), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        # With fewer processes than before, the parts of the others have a keeper too.
        own = [part for part in list_parts(self.folder) if part.process % args.world_size == self.process]
        cut_after(self.folder, state.global_step, own)
        for part in list_parts(self.folder):
            if part.process == self.process:
                texts = read_table(part.path(self.folder, "texts"), TEXTS)
                self._seen.update(texts[SAMPLE_ID].to_pylist())
                self._text_tokens += pc.sum(pc.list_value_length(texts["input_ids"])).as_py() or 0
        if state.is_world_process_zero:
            self._write_run(args, state, kwargs["model"])
            self._cut_logs(state.global_step)

    def _write_run(self, args: "QTuningSFTConfig", state: TrainerState, model: PreTrainedModel) -> None:
        summary = run_summary(self.record(), args)
        file = self.folder / "run.json"
        facts = {
            "format": FORMAT,
            "recorded_from": self._first_step(file, state.global_step),
            "model": model.config._name_or_path,
            "data": self.data(),
            "max_steps": state.max_steps,
            "resumed_from": state.global_step,
            **{name: summary[name] for name in ("num_processes", "config", "versions")},
        }
        write_whole(file, json.dumps(facts, indent=2) + "\n")
        self.tokenizer.save_pretrained(self.folder / "tokenizer")

    def _cut_logs(self, step: int) -> None:
        logs = [entry for entry in read_logs(self.folder) if step and entry["step"] <= step]
        write_whole(self.folder / LOGS_NAME, "".join(json.dumps(entry) + "\n" for entry in logs))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self._begun or not state.is_world_process_zero:
            return
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, float | int)}
        own = {name: value for name, value in numbers.items() if not name.startswith("qtuning/")}  # `steps` has these
        with open(self.folder / LOGS_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **own}) + "\n")

    def _first_step(self, file: Path, resumed_from: int) -> int:
        """The first step that the record holds, which a resumed run goes on with."""
        if resumed_from == 0:
            return 1
        try:
            return int(json.loads(file.read_text(encoding="utf-8"))["recorded_from"])
        except (OSError, ValueError, KeyError, TypeError):  # there was no record, or an earlier version's
            return min([part.first for part in list_parts(self.folder)], default=resumed_from + 1)

    def on_step_end(self, args, state, control, **kwargs):
        record = self.record()
        record.on_step_end(args, state, control)  # of no effect if it was called before, as it is in most runs
        step = record.last_step
        for group in self._groups:
            group |= {"step": state.global_step, "seconds": step["seconds_selecting"]}
            self._rows += len(group[SAMPLE_ID])
        self._samples += self._groups
        self._groups = []
        self._steps.append({**step, "step": state.global_step})
        waited = time.monotonic() - self._written
        if control.should_save or self._rows >= FLUSH_ROWS or waited >= FLUSH_SECONDS:
            self.flush()

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_save:
            self.flush()

    def on_save(self, args, state, control, **kwargs):
        self.flush()  # where another callback asked for the checkpoint after this one was called

    def on_train_end(self, args, state, control, **kwargs):
        self.flush()

    def flush(self) -> None:
        """Write what was taken in since the last part, if anything."""
        if not self._steps:
            return
        first, last = self._steps[0]["step"], self._steps[-1]["step"]
        steps = self._steps if self.process == 0 else []
        tables = {
            "samples": self._samples_table(),
            "steps": pa.Table.from_pylist([{name: row.get(name) for name in STEPS.names} for row in steps], STEPS),
            "texts": pa.table(
                [
                    pa.array(self._texts.keys(), pa.int64()),
                    pa.array([ids for ids, _ in self._texts.values()], TEXTS.field("input_ids").type),
                    pa.array([answer for _, answer in self._texts.values()], TEXTS.field("answer").type),
                ],
                schema=TEXTS,
            ),
        }
        self._clear()
        write_part(self.folder, Part(self.process, first, last), tables)

    def _samples_table(self) -> pa.Table:
        columns = {}
        for field in SAMPLES:
            values: list[Any] = []
            for group in self._samples:
                value = self.process if field.name == "process" else group[field.name]
                # What is one value for the whole group is repeated for each of its samples.
                values.extend(value if isinstance(value, list) else [value] * len(group[SAMPLE_ID]))
            columns[field.name] = pa.array(values, field.type)
        return pa.table(columns, schema=SAMPLES)


def is_sampled(sample_id: int, share: float) -> bool:
    """Whether a sample belongs to a share of all samples: the same ones at every step, on every process."""
    # Multiplying by the golden ratio (Knuth) spreads neighbouring ids evenly.
    return (sample_id * 0x9E3779B97F4A7C15) % 2**64 < share * 2**64


# Reading


class RecordReader:
    """
    A run's record as far as all its processes have written it: the run may be over, going on, or crashed.

    Args:
        path (`str` or `Path`): The run's output directory, or the folder `_qtuning_record` in it.

    Raises:
        `ValueError`: If there is no record, or it is not one of ours.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{str(path)!r} is no folder: give the `output_dir` of a run.")
        self.folder = path if (path / "run.json").is_file() else path / RECORD_NAME
        try:
            self.run: dict[str, Any] = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            found = self.run["format"]
        except FileNotFoundError:
            raise ValueError(
                f"{str(path)!r} holds no record ({RECORD_NAME}/run.json): give the `output_dir` of a run that was "
                "trained with `record: true` and a `sample_pruner` that needs scores."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{str(self.folder / 'run.json')!r} was not written by qtuning-trl: give a run's `output_dir`."
            ) from None
        if found != FORMAT:
            raise ValueError(
                f"{str(self.folder)!r} has format {found} and this version of qtuning-trl reads {FORMAT}: read it with "
                "the version that wrote it."
            )
        self.parts = list_parts(self.folder)
        last = dict.fromkeys(range(self.run["num_processes"]), self.run["resumed_from"])
        for part in self.parts:
            if part.process in last:
                last[part.process] = max(last[part.process], part.last)
        self.last_step = min(last.values())  # each process writes when it likes: beyond it, some have not yet

    def missing_steps(self) -> list[int]:
        """
        Steps that were made and are not in the record whole, since parts or files of them are gone.

        Process 0 counts the candidates of all processes that have a place on the plane; each of them has a row.
        """
        rows = Counter(self._steps_of("samples", ["step"])["step"].to_pylist())
        counted = {
            step["step"]: sum(step[name] or 0 for name in QUADRANTS.values()) for step in self.steps().to_pylist()
        }
        first = self.run.get("recorded_from", min(counted, default=1))
        return [step for step in range(first, self.last_step + 1) if counted.get(step) != rows[step]]

    def samples(self) -> pa.Table:
        """A row per scored sample and step (see [`load_record`]), in order of step and process."""
        return self._steps_of("samples").sort_by([("step", "ascending"), ("process", "ascending")])

    def steps(self) -> pa.Table:
        """A row per optimizer step: counts over all processes, mean thresholds, and the seconds of process 0."""
        return self._steps_of("steps").sort_by("step")

    def logs(self) -> list[dict[str, float]]:
        """What was logged (loss, learning rate, evaluations), with its `step`; none in older records."""
        return read_logs(self.folder)

    def texts(self, sample_ids: Iterable[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """
        Tokens of some samples, as far as they were recorded.

        Returns:
            `dict`: By sample id, `input_ids` and which of them belong to the answer; arrays of shape `(tokens,)`.
        """
        wanted = pa.array(sorted(set(sample_ids)), pa.int64())
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for part in self.parts:
            table = read_table(part.path(self.folder, "texts"), TEXTS)
            table = table.filter(pc.is_in(table[SAMPLE_ID], wanted))
            for sample_id, ids, answer in zip(*(table[name] for name in TEXTS.names), strict=True):
                found[sample_id.as_py()] = ids.values.to_numpy(), answer.values.to_numpy(zero_copy_only=False)
        return found

    def tokenizer(self) -> Any:
        """The run's tokenizer; `None` if it cannot be loaded without code from elsewhere."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError):
            return None

    def _steps_of(self, name: str, columns: list[str] | None = None) -> pa.Table:
        tables = [TABLES[name].empty_table().select(columns or TABLES[name].names)]
        tables += [read_table(part.path(self.folder, name), TABLES[name], columns) for part in self.parts]
        return pa.concat_tables(tables, promote_options="default").filter(pc.field("step") <= self.last_step)


def read_logs(folder: Path) -> list[dict[str, float]]:
    """Lines of a record's log; a line that a kill cut off is passed over, and nothing is no log."""
    entries = []
    try:
        lines = (folder / LOGS_NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def steps_in_words(steps: list[int]) -> str:
    """`step 3 is`, `2 steps from 3 to 4 are`."""
    return f"step {steps[0]} is" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]} are"


def load_record(path: str | Path, as_frame: bool = False) -> "Dataset | pd.DataFrame":
    """
    What a run decided about each sample, step by step.

    - `step`: optimizer step, from 1.
    - `sample_id`: row number of the training set, or a hash of the tokens where rows have none (streams, packing).
    - `process`: the process that held the sample.
    - `perplexity`, `entropy`: its place on the EU plane; the entropy in nats.
    - `quadrant`: 1 to 4 for Q1 to Q4, 0 for between the thresholds.
    - `kept`: whether it was trained on.
    - `reason`: what decided that. `quadrant`: where it lies (Q2 and Q4 are kept); `fill`: kept although it lies
      elsewhere, to reach the budget; `trim`: dropped although in Q2 or Q4, to meet the budget; `pruner`: another
      `sample_pruner` than Q-Tuning's.
    - `answer_tokens`, `kept_tokens`: tokens of its answer, and how many of them were trained on.
    - `seconds`: what selecting took this process in that step.
    - `group`: its value of `group_column`, as text.
    - `kept_mask`: which answer tokens were kept, where stage 2 pruned some and `record_tokens` covers the sample.
    - `perplexity_low`, `perplexity_high`, `entropy_low`, `entropy_high`: thresholds among those it was compared with.

    Args:
        path (`str` or `Path`): The run's output directory, or the folder `_qtuning_record` in it. The run may be over,
            still going, or crashed; rows that some process has not written yet are left out.
        as_frame (`bool`): Give a pandas frame instead.

    Returns:
        [`~datasets.Dataset`] or [`~pandas.DataFrame`]: A row per scored sample and step. Empty if the run keeps
        everything, which scores nothing.

    Raises:
        `ValueError`: If there is no record, or it is not one of ours.
    """
    reader = RecordReader(path)
    table, missing = reader.samples(), reader.missing_steps()
    if missing:
        logger.warning(f"{reader.folder}: {steps_in_words(missing)} gone, whole or in part, and not among the rows.")
    if as_frame:
        return table.to_pandas()
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(table))
