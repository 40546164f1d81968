"""The parts of a record on the disk: tables of a few steps, in folders that are written once and whole."""

import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..step.sample import KEPT_MASK, SAMPLE_ID
from .run import COUNTS, PHASES, THRESHOLDS

PART = re.compile(r"^part-(\d+)-(\d+)-(\d+)$")

SAMPLES = pa.schema(
    [
        ("step", pa.int64()),
        (SAMPLE_ID, pa.int64()),
        ("process", pa.int32()),
        ("perplexity", pa.float64()),
        ("entropy", pa.float64()),
        ("quadrant", pa.int8()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("answer_tokens", pa.int32()),
        ("kept_tokens", pa.int32()),
        ("seconds", pa.float64()),
        ("group", pa.string()),
        (KEPT_MASK, pa.list_(pa.bool_())),
        *((name, pa.float64()) for name in THRESHOLDS),
    ]
)
STEPS = pa.schema(
    [
        ("step", pa.int64()),
        *((name, pa.int64()) for name in COUNTS),
        *((name, pa.float64()) for name in (*THRESHOLDS, "pool_nll", "pool_entropy")),
        *((f"seconds_{phase}", pa.float64()) for phase in PHASES),
    ]
)
TEXTS = pa.schema([(SAMPLE_ID, pa.int64()), ("input_ids", pa.list_(pa.int32())), ("answer", pa.list_(pa.bool_()))])
TABLES = {"samples": SAMPLES, "steps": STEPS, "texts": TEXTS}


@dataclass(frozen=True, order=True)
class Part:
    """The steps `first` to `last` that a process recorded."""

    process: int
    first: int
    last: int

    def __str__(self) -> str:
        return f"part-{self.process:05d}-{self.first:08d}-{self.last:08d}"

    def path(self, folder: Path, table: str) -> Path:
        return folder / str(self) / f"{table}.parquet"


def list_parts(folder: Path) -> list[Part]:
    """The parts of a record by process and step; of two that begin together (a cut was interrupted) the shorter one."""
    parts: dict[tuple[int, int], Part] = {}
    for part in _all_parts(folder):
        parts.setdefault((part.process, part.first), part)
    return list(parts.values())


def _all_parts(folder: Path) -> list[Part]:
    names = [match for match in map(PART.match, os.listdir(folder)) if match]
    return sorted(Part(*map(int, match.groups())) for match in names)


def write_part(folder: Path, part: Part, tables: dict[str, pa.Table]) -> None:
    """Write the tables that have rows; the part is there whole or not at all."""
    temporary = folder / f".{part}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, table in tables.items():
        if len(table):
            with open(temporary / f"{name}.parquet", "wb") as file:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
    _sync_folder(temporary)
    temporary.rename(folder / str(part))
    _sync_folder(folder)


def write_whole(path: Path, text: str) -> None:
    """Write a file under a hidden name and rename it, so that a kill leaves no half of it."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def cut_after(folder: Path, step: int, parts: Collection[Part]) -> None:
    """
    Remove what these parts hold beyond a step; the latest first, so that an interruption leaves no gap.

    Before that, what an interrupted cut left of the longer ones that begin with them, lest it passes for this run's.
    """
    begun = {(part.process, part.first) for part in parts}
    for part in _all_parts(folder):
        if (part.process, part.first) in begun and part not in parts:
            _remove(folder, part)
    for part in sorted(parts, reverse=True):
        if part.last <= step:
            continue
        if part.first <= step:
            tables = {name: read_table(part.path(folder, name), schema) for name, schema in TABLES.items()}
            for name in ("samples", "steps"):
                tables[name] = tables[name].filter(pc.field("step") <= step)
            write_part(folder, Part(part.process, part.first, step), tables)
        _remove(folder, part)


def _remove(folder: Path, part: Part) -> None:
    hidden = folder / f".{part}"
    (folder / str(part)).rename(hidden)
    shutil.rmtree(hidden)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """A table of a part, or some columns of it; an empty one if the part has none."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is gone: the run was started again meanwhile; read its record anew.")
    if not path.is_file():
        return schema.empty_table().select(columns or schema.names)
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} is no Parquet file that a run wrote ({type(error).__name__}): remove its folder to read the rest."
        ) from error
