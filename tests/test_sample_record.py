"""The record: its rows say what the trainer did, through kills, resumes and several processes; and reading it back."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import prompt_completion_rows
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from test_trainer import PACKED, Recorder, make_trainer, rows_of
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from qtuning_trl import load_record
from qtuning_trl.records import samples as sample_record
from qtuning_trl.records.run import COUNTS, SUMMARY_NAME
from qtuning_trl.records.samples import RECORD_NAME, RecordReader, is_sampled, list_parts
from qtuning_trl.report.report import run_data, write_report

TESTS = Path(__file__).parent


def train(tmp_path, tokenizer, dataset, **options):
    trainer = make_trainer(tmp_path, tokenizer, dataset, **{"budget": "50x50", "group_column": "source", **options})
    trainer.train()
    return trainer


class Pools(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.pools = trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        self.pools.append(self.trainer.last_pool)


def record_parts(path) -> list[tuple[int, int, int]]:
    return [(part.process, part.first, part.last) for part in list_parts(Path(path, RECORD_NAME))]


# What the rows say


@pytest.mark.parametrize("scope", ["process", "all_processes", "micro_batch"])
def test_every_scored_sample_of_every_step_is_a_row(tmp_path, tokenizer, prompt_completion, scope):
    trainer = make_trainer(
        tmp_path, tokenizer, prompt_completion, budget="50x50", group_column="source", selection_scope=scope
    )
    pools = Pools(trainer)
    trainer.add_callback(pools)
    trainer.train()
    frame = load_record(tmp_path, as_frame=True)
    assert len(frame) == 80
    for step, pool in enumerate(pools.pools, start=1):
        rows = frame[frame.step == step]
        for name in ("sample_id", "perplexity", "entropy", "quadrant", "kept", "group"):
            assert rows[name].tolist() == pool[name], name
        assert (rows.reason == "fill").tolist() == pool["filled"]
        assert rows.seconds.nunique() == 1
        if scope != "micro_batch":
            for name, value in pool["thresholds"].items():
                assert set(rows[name]) == {value}
    comparisons = {"micro_batch": 20}.get(scope, 6)
    thresholds = ["step", "perplexity_low", "perplexity_high", "entropy_low", "entropy_high"]
    assert len(frame[thresholds].drop_duplicates()) == comparisons


def test_reasons_follow_from_quadrant_and_kept(tmp_path, tokenizer, prompt_completion):
    train(tmp_path, tokenizer, prompt_completion)
    frame = load_record(tmp_path, as_frame=True)
    inside = frame.quadrant.isin([2, 4])
    assert (frame.reason == "trim").equals(inside & ~frame.kept)
    assert (frame.reason == "fill").equals(~inside & frame.kept)
    assert set(frame.reason) == {"quadrant", "fill", "trim"}


def test_totals_equal_the_summary(tmp_path, tokenizer, prompt_completion):
    trainer = train(tmp_path, tokenizer, prompt_completion, selection_scope="micro_batch")
    frame, summary = load_record(tmp_path, as_frame=True), trainer.summary()
    assert (len(frame), frame.kept.sum()) == (summary["candidates"], summary["kept"])
    tokens = summary["answer_tokens"]
    assert (frame.answer_tokens.sum(), frame.kept_tokens.sum()) == (tokens["candidates"], tokens["kept"])
    assert (frame.reason == "fill").sum() == summary["filled"]
    assert (frame.reason == "trim").sum() == summary["trimmed"]
    for number, name in ((1, "q1"), (2, "q2"), (3, "q3"), (4, "q4"), (0, "between")):
        assert (frame.quadrant == number).sum() == summary["quadrants"][name]
    for name, group in summary["groups"].items():
        rows = frame[frame.group == name]
        assert (len(rows), rows.kept.sum()) == (group["candidates"], group["kept"])
    steps = RecordReader(tmp_path).steps().to_pandas()
    assert {name: steps[name].sum() for name in COUNTS} == trainer.run_record.totals["counts"]
    for phase in ("scoring", "selection", "collation", "training"):
        assert steps[f"seconds_{phase}"].sum() == pytest.approx(summary["seconds"][phase])


@pytest.mark.parametrize("options", [{}, {"token_pruning": "drop"}, PACKED])
def test_masks_and_texts_give_what_was_trained_on(tmp_path, tokenizer, prompt_completion, options):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, budget="50x50", max_steps=1, **options)
    seen = Recorder().attach(trainer)
    trainer.train()
    frame = load_record(tmp_path, as_frame=True)
    texts = RecordReader(tmp_path).texts(frame.sample_id)
    assert len(texts) == len(frame)
    expected = []
    for row in frame[frame.kept].itertuples():
        ids, answer = texts[row.sample_id]
        mask = np.ones(answer.sum(), dtype=bool) if row.kept_mask is None else np.array(row.kept_mask)
        assert (answer.sum(), mask.sum()) == (row.answer_tokens, row.kept_tokens)
        expected.append(ids[answer][mask].tolist())
    assert any(mask is not None for mask in frame.kept_mask)
    assert not any(mask is not None for mask in frame.kept_mask[~frame.kept])
    trained = [[x for x in row["labels"] if x != -100] for batch in seen.batches[0] for row in rows_of(batch)]
    assert sorted(trained) == sorted(expected)
    loaded = RecordReader(tmp_path).tokenizer()
    ids, _ = next(iter(texts.values()))
    assert loaded.decode(ids) == tokenizer.decode(ids)


def test_masks_are_recorded_for_a_share_of_the_samples(tmp_path, tokenizer, prompt_completion):
    train(tmp_path, tokenizer, prompt_completion, record_tokens=0.5)
    frame = load_record(tmp_path, as_frame=True)
    pruned = frame[frame.kept & (frame.kept_tokens < frame.answer_tokens)]
    sampled = pruned.sample_id.map(lambda sample_id: is_sampled(sample_id, 0.5))
    assert 0 < sampled.sum() < len(pruned)
    assert pruned.kept_mask.notna().equals(sampled)
    assert [is_sampled(7, share) for share in (0.0, 1.0)] == [False, True]
    assert sum(is_sampled(sample_id, 0.1) for sample_id in range(10_000)) == pytest.approx(1000, rel=0.05)


def test_recording_changes_nothing_that_is_trained(tmp_path, tokenizer, prompt_completion):
    runs = [
        train(tmp_path / str(record), tokenizer, prompt_completion, dropout=0.1, record=record)
        for record in (True, False)
    ]
    entries = [
        [{k: v for k, v in entry.items() if "seconds" not in k and "runtime" not in k and "per_second" not in k}
         for entry in run.state.log_history]
        for run in runs
    ]  # fmt: skip
    assert entries[0] == entries[1]
    assert not (tmp_path / "False" / RECORD_NAME).exists()


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"budget": "100x100"}, 80), ({"sample_pruner": "random", "token_pruner": "hardest"}, 40)],
)
def test_a_run_that_does_not_score_its_pools_records_its_steps_alone(
    tmp_path, tokenizer, prompt_completion, options, kept
):
    train(tmp_path, tokenizer, prompt_completion, group_column=None, **options)
    dataset = load_record(tmp_path)
    assert len(dataset) == 0
    assert "perplexity" in dataset.column_names
    steps = RecordReader(tmp_path).steps().to_pandas()
    assert steps.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert steps.kept_samples.sum() == kept
    assert RecordReader(tmp_path).missing_steps() == []
    write_report([tmp_path], tmp_path / "report.html")


def test_a_push_leaves_out_the_record_and_the_report_which_hold_texts(
    tmp_path, tokenizer, prompt_completion, monkeypatch
):
    trainer = train(tmp_path, tokenizer, prompt_completion, save_strategy="steps", save_steps=6)
    write_report([tmp_path])
    pushed: list[str] = []

    def upload_folder(self, *, folder_path, ignore_patterns, **_):
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        assert any(file.endswith("texts.parquet") for file in files)
        pushed.extend(filter_repo_objects(files, ignore_patterns=ignore_patterns))

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    trainer.hub_model_id, trainer.args.hub_strategy = "me/mine", HubStrategy.EVERY_SAVE
    trainer.push_in_progress = None
    trainer.push_to_hub()
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-6"))
    assert {"model.safetensors", SUMMARY_NAME} <= set(pushed)
    assert not [file for file in pushed if "record" in file or "report" in file or "text" in file]


# Interruption


def test_a_resumed_record_has_neither_gap_nor_double(tmp_path, tokenizer, prompt_completion, monkeypatch):
    monkeypatch.setattr(sample_record, "FLUSH_ROWS", 30)  # parts that do not end where checkpoints do

    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path / "whole", tokenizer, prompt_completion, **options)
    broken = make_trainer(tmp_path / "broken", tokenizer, prompt_completion, budget="50x50", **options)
    broken.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert record_parts(tmp_path / "broken") == [(0, 1, 2), (0, 3, 3), (0, 4, 5)]
    assert RecordReader(tmp_path / "broken").last_step == 5

    resumed = make_trainer(
        tmp_path / "broken", tokenizer, prompt_completion, budget="50x50", group_column="source", **options
    )
    resumed.train(resume_from_checkpoint=True)
    whole, frame = (load_record(tmp_path / name, as_frame=True) for name in ("whole", "broken"))
    same = ["step", "sample_id", "perplexity", "entropy", "quadrant", "kept", "reason", "answer_tokens", "kept_tokens"]
    assert frame[same].equals(whole[same])
    texts = [RecordReader(tmp_path / name).texts(whole.sample_id) for name in ("whole", "broken")]
    assert texts[0].keys() == texts[1].keys()


def test_a_part_that_straddles_the_checkpoint_is_cut(tmp_path, tokenizer, prompt_completion):
    train(tmp_path, tokenizer, prompt_completion, max_steps=4, save_strategy="steps", save_steps=4)
    folder = tmp_path / RECORD_NAME
    before = load_record(tmp_path, as_frame=True)
    assert record_parts(tmp_path) == [(0, 1, 4)]
    sample_record.cut_after(folder, 2, list_parts(folder))
    assert record_parts(tmp_path) == [(0, 1, 2)]
    assert load_record(tmp_path, as_frame=True).equals(before[before.step <= 2])
    assert len(RecordReader(tmp_path).texts(before.sample_id)) == before.sample_id.nunique()


def test_an_interrupted_cut_leaves_no_double(tmp_path, tokenizer, prompt_completion, monkeypatch):
    train(tmp_path, tokenizer, prompt_completion, max_steps=4)
    folder = tmp_path / RECORD_NAME
    rename = Path.rename

    def interrupted(self, target):
        if self.name == str(sample_record.Part(0, 1, 4)):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_record.cut_after(folder, 2, list_parts(folder))
    assert len([name for name in os.listdir(folder) if name.startswith("part-")]) == 2
    frame = load_record(tmp_path, as_frame=True)
    assert sorted(set(frame.step)) == [1, 2]
    assert not frame.duplicated(["step", "sample_id"]).any()
    monkeypatch.undo()
    train(tmp_path, tokenizer, prompt_completion, max_steps=5)  # anew
    assert [str(part) for part in list_parts(folder)] == [str(sample_record.Part(0, 1, 5))]
    assert RecordReader(tmp_path).missing_steps() == []


def test_a_fresh_run_starts_the_record_anew_and_removes_its_own_files_only(tmp_path, tokenizer, prompt_completion):
    train(tmp_path, tokenizer, prompt_completion)
    note = tmp_path / RECORD_NAME / "note.txt"
    note.write_text("mine")
    train(tmp_path, tokenizer, prompt_completion, max_steps=2)
    assert set(load_record(tmp_path)["step"]) == {1, 2}
    assert note.read_text() == "mine"


def test_a_killed_run_leaves_whole_parts(tmp_path, tokenizer_dir):
    """SIGKILL in the middle of writing a part: what was written before can be read, and a new run goes on."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(TESTS)!r})
from conftest import prompt_completion_rows
from datasets import Dataset
from test_trainer import make_trainer
from transformers import PreTrainedTokenizerFast
from qtuning_trl.records import parts, samples as sample_record

sample_record.FLUSH_ROWS = 1
write = parts.pq.write_table
def killing(table, file, **kwargs):
    if "00000003" in file.name and "samples" in file.name:
        file.write(b"PAR1 half a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(table, file, **kwargs)
parts.pq.write_table = killing
dataset = Dataset.from_list(prompt_completion_rows(40))
tokenizer = PreTrainedTokenizerFast.from_pretrained({tokenizer_dir!r})
make_trainer({str(tmp_path)!r}, tokenizer, dataset, budget="50x50").train()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    reader = RecordReader(tmp_path)
    assert reader.last_step == 2
    assert not (tmp_path / SUMMARY_NAME).exists()
    frame = load_record(tmp_path, as_frame=True)
    assert frame.groupby("step").size().tolist() == [16, 16]
    assert len(reader.texts(frame.sample_id)) == 32
    assert len(reader.steps()) == 2


# Reading


def test_it_reads_as_a_dataset_from_the_run_or_from_the_record(tmp_path, tokenizer, prompt_completion):
    train(tmp_path, tokenizer, prompt_completion)
    dataset = load_record(tmp_path)
    assert isinstance(dataset, Dataset)
    assert load_record(str(tmp_path / RECORD_NAME))["sample_id"] == dataset["sample_id"]
    assert dataset.filter(lambda row: row["kept"]).num_rows == sum(dataset["kept"])


def test_steps_that_some_process_has_not_written_are_left_out(tmp_path, tokenizer, prompt_completion, monkeypatch):
    monkeypatch.setattr(sample_record, "FLUSH_ROWS", 30)
    train(tmp_path, tokenizer, prompt_completion)
    folder = tmp_path / RECORD_NAME
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "num_processes": 2}))
    assert len(load_record(tmp_path)) == 0
    (folder / "part-00000-00000001-00000002").rename(folder / "part-00001-00000001-00000002")
    assert set(load_record(tmp_path)["step"]) == {1, 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no record .* trained with `record: true`"),
        ("{}", "was not written by qtuning-trl"),
        ("[1, 2", "was not written by qtuning-trl"),
        ('{"format": 99}', "has format 99 and this version of qtuning-trl reads 1"),
    ],
)
def test_missing_and_foreign_records_are_refused_in_one_sentence(tmp_path, content, message):
    if content is not None:
        (tmp_path / RECORD_NAME).mkdir()
        (tmp_path / RECORD_NAME / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_record(tmp_path)
    with pytest.raises(ValueError, match="is no folder: give the `output_dir` of a run"):
        load_record(tmp_path / "nowhere")


def test_a_foreign_file_in_a_part_is_named(tmp_path, tokenizer, prompt_completion):
    train(tmp_path, tokenizer, prompt_completion, max_steps=1)
    file = tmp_path / RECORD_NAME / "part-00000-00000001-00000001" / "samples.parquet"
    file.write_text("step,sample\n1,2\n")
    with pytest.raises(ValueError, match=r"samples\.parquet is no Parquet file that a run wrote"):
        load_record(tmp_path)


@pytest.mark.parametrize(
    ("gone", "steps", "told"),
    [
        ("part-00000-00000001-00000002", {3, 4, 5, 6}, "2 steps from 1 to 2 are gone"),
        ("part-00000-00000003-00000004", {1, 2, 5, 6}, "2 steps from 3 to 4 are gone"),
        ("part-00000-00000003-00000004/samples.parquet", {1, 2, 5, 6}, "2 steps from 3 to 4 are gone"),
    ],
)
def test_what_is_gone_from_a_record_is_told(
    tmp_path, tokenizer, prompt_completion, monkeypatch, caplog, gone, steps, told
):
    monkeypatch.setattr(sample_record, "FLUSH_ROWS", 24)
    train(tmp_path, tokenizer, prompt_completion)
    assert RecordReader(tmp_path).missing_steps() == []
    path = tmp_path / RECORD_NAME / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    assert set(load_record(tmp_path)["step"]) == steps
    assert RecordReader(tmp_path).missing_steps() == sorted({1, 2, 3, 4, 5, 6} - steps)
    assert f"{told}, whole or in part, and not among the rows" in caplog.text
    assert f"{told} from the record" in run_data(RecordReader(tmp_path), "run")["state"]


def test_a_record_that_begins_with_a_resumed_run_lacks_nothing(tmp_path, tokenizer, prompt_completion):
    options = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, tokenizer, prompt_completion, record=False, max_steps=2, **options)
    for steps in (4, 6):
        trainer = make_trainer(tmp_path, tokenizer, prompt_completion, budget="50x50", max_steps=steps, **options)
        trainer.train(resume_from_checkpoint=True)
    reader = RecordReader(tmp_path)
    assert (reader.last_step, set(reader.samples()["step"].to_pylist())) == (6, {3, 4, 5, 6})
    assert reader.missing_steps() == []


def test_texts_are_capped(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sample_record, "MAX_TEXT_TOKENS", 100)
    dataset = Dataset.from_list(prompt_completion_rows(40))
    train(tmp_path, tokenizer, dataset)
    texts = RecordReader(tmp_path).texts(range(40))
    assert 1 < len(texts) < 40
    assert 100 <= sum(len(ids) for ids, _ in texts.values()) < 100 + 64
