"""What is left out of a training set, cut off or unusual is counted and said: before every training, by --dry-run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import prompt_completion_rows, tiny_llama
from datasets import Dataset
from test_data_shapes import byte_models, command, refusal  # noqa: F401 (fixtures)
from test_trainer import COMMON, make_trainer

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer, cli
from qtuning_trl.data_check import (
    CUT_WHOLE,
    DataCheck,
    count_answers,
    count_steps,
    drop_void_rows,
    one_line,
    step_sizes,
    unusual,
)
from qtuning_trl.dry_run import describe, prepared_rows
from qtuning_trl.scripts import sft
from qtuning_trl.step.sample import answer_lengths, split_documents

RECIPES = Path(__file__).parents[1] / "recipes"
QUESTIONS = RECIPES / "data" / "local_question_answer.yaml"


def said(trainer) -> str:
    return one_line(trainer.data_check, trainer.args, prepared_rows(trainer))


def oddities(trainer) -> str:
    return " ".join(unusual(trainer.data_check, trainer.args, prepared_rows(trainer)))


# Rows without an answer


def test_rows_with_empty_and_null_answers_are_left_out_and_counted(command, capsys):  # noqa: F811
    trainer = sft.main(*sft.parse(command("gaps.jsonl", "base", config=QUESTIONS)).dataclasses)
    texts = [trainer._tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert texts == [
        "Question: one plus one\nAnswer: two, which is the sum<|im_end|>",
        "Question: two plus one\nAnswer: three, which is the sum<|im_end|>",
    ]
    line = "Data: 5 rows, 3 of them left out (3 with an empty answer); 1 step of 2 candidates, about 1 of them kept."
    assert line in capsys.readouterr().out
    assert trainer.summary()["candidates"] == 2


def test_only_empty_answers_are_refused(refusal, tmp_path):  # noqa: F811
    (tmp_path / "void.jsonl").write_text('{"question": "a", "answer": ""}\n{"question": "b", "answer": null}\n')
    line = refusal(str(tmp_path / "void.jsonl"), "base", config=QUESTIONS)
    assert "`train_dataset` has no row with an answer (2 rows with an empty answer)" in line


USER, SAYS = {"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}
VOID = [
    ("text", {"text": "abc"}, [{"text": None}, {"text": ""}], {"an empty answer": 2}),
    (
        "prompt_completion",
        {"prompt": "a", "completion": "bc"},
        [{"prompt": "a", "completion": None}, {"prompt": None, "completion": "b"}],
        {"an empty answer": 1, "a null prompt": 1},
    ),
    (
        "messages",
        {"messages": [USER, SAYS]},
        [
            {"messages": [USER, {"role": "assistant", "content": None}]},
            {"messages": [USER, {"role": "assistant", "content": ""}, USER, SAYS]},
            {"messages": [USER]},
            {"messages": []},
        ],
        {"an empty answer": 2, "no turn of an assistant": 2},
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "whole", "void", "reasons"), VOID, ids=[case[0] for case in VOID])
def test_nulls_in_python_are_left_out_too(tmp_path, tokenizer, stream, kind, whole, void, reasons):
    dataset = Dataset.from_list([*void, *[whole] * 16])
    dataset = dataset.to_iterable_dataset() if stream else dataset
    trainer = make_trainer(tmp_path, tokenizer, dataset, max_steps=1, num_train_epochs=1)
    assert len(list(trainer.train_dataset)) == 16
    if stream:
        assert said(trainer).startswith("Data: a stream, whose rows are not counted; 1 step of 16 candidates")
    else:
        assert dict(trainer.data_check.dropped) == reasons
        assert trainer.train_dataset["sample_id"][0] == len(void), "samples keep the numbers of their rows"
    trainer.train()
    assert trainer.summary()["candidates"] == 16


def test_an_answer_that_only_calls_a_tool_is_an_answer(tmp_path):
    call = {"function": {"name": "f", "arguments": {"x": "1"}}}
    args = QTuningSFTConfig(str(tmp_path), **COMMON)
    rows = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}]
    dataset, check = drop_void_rows(Dataset.from_list(rows), args)
    assert (len(dataset), check.rows, set(check.first)) == (1, 1, {"tool_calls"})


def test_empty_answers_of_an_evaluation_set_are_left_out(tmp_path, tokenizer, caplog):
    rows = prompt_completion_rows(8)
    rows[0] = {**rows[0], "completion": None}
    trainer = make_trainer(tmp_path, tokenizer, Dataset.from_list(rows), eval_strategy="steps", eval_steps=1)
    assert len(trainer.eval_dataset) == 7
    assert "`eval_dataset` has 1 of 8 rows with an empty answer" in caplog.text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1, 5, 6], "labels": [-100] * 3}, "2 with no labelled token"),
        ({"input_ids": [], "labels": []}, "2 with no tokens"),
    ],
)
def test_tokenized_rows_without_labels_are_refused_as_that(tmp_path, tokenizer, row, reason):
    kind = {"input_ids": [[0]], "labels": [[0]]}
    dataset = Dataset.from_list([row] * 2, features=Dataset.from_dict(kind).features)
    with pytest.raises(ValueError, match=reason) as error:
        make_trainer(tmp_path, tokenizer, dataset)
    assert "max_length" not in str(error.value)


def test_columns_and_preferences_are_refused_in_python_too(tmp_path, tokenizer):
    for row, message in [
        ({"instruction": "a", "output": "b"}, "the columns instruction, output, which are Alpaca's"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen' and 'rejected', which are preferences"),
        ({"prompt": "a", "completion": "b", "label": True}, "'label' of true and false, which are preferences"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversations with the role 'human': map it by"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "conversations with the role 'gpt': map it by"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, tokenizer, Dataset.from_list([row]))


def test_a_formatting_func_takes_any_columns(tmp_path, tokenizer):
    QTuningSFTTrainer(
        tiny_llama(), QTuningSFTConfig(str(tmp_path), **COMMON), processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"x": "a"}] * 4), formatting_func=lambda row: row["x"] * 4,
    )  # fmt: skip


# Answers that are cut off


def test_answers_cut_short_are_counted_exactly(tmp_path, tokenizer):
    """Rows of 4 + n + 1 tokens, n = 1 ... 40, cut at 16: whole up to n = 11, short from n = 12 on; 8 are all prompt."""
    rows = [{"prompt": "abcd", "completion": "e" * n} for n in range(1, 41)]
    rows += [{"prompt": "a" * 16, "completion": "bc"}] * 8
    dataset = Dataset.from_list(rows)
    trainer = make_trainer(tmp_path, tokenizer, dataset, max_length=16)
    check = trainer.data_check
    assert (check.rows, check.cut, check.dropped.total()) == (48, 29, 8)
    assert len(trainer.train_dataset) == 40
    assert sorted(check.answer_lengths) == sorted(min(n + 1, 12) for n in range(1, 41))
    assert said(trainer) == (
        "Data: 48 rows, 8 of them left out (8 with an answer that `max_length` cuts off as a whole), 29 answers cut "
        "short by `max_length` 16; 6 steps of 16 candidates, about 2 of them kept."
    )
    assert "`max_length` is 16: it cuts short the answers of 29 of 48 rows" in oddities(trainer)
    # From n = 15 on: the first token of a row is not predicted.
    from_behind = make_trainer(tmp_path, tokenizer, dataset, max_length=16, truncation_mode="keep_end")
    assert (from_behind.data_check.cut, from_behind.data_check.dropped.total()) == (26, 0)
    packed = make_trainer(tmp_path, tokenizer, dataset, max_length=16, packing=True)
    assert (packed.data_check.cut, packed.data_check.dropped.total()) == (29, 8)
    documents = [document for row in packed.train_dataset for document in split_documents(row)]
    assert sum(answer_lengths(documents)) == packed.data_check.answer_lengths.sum()
    split = make_trainer(tmp_path, tokenizer, dataset, max_length=16, packing=True, packing_strategy="bfd_split")
    assert (split.data_check.cut, split.data_check.dropped.total()) == (0, 0)


# Steps and pools


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool_factor": 2, "sample_ratio": 0.25},
        {"max_steps": 3},
        {"selection_scope": "micro_batch", "sample_ratio": 0.5},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 30},
        {"sample_ratio": 1.0, "token_ratio": 1.0},
    ],
)
def test_steps_candidates_and_survivors_are_those_of_the_run(tmp_path, tokenizer, prompt_completion, options):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, **options)
    steps, (candidates, survivors) = count_steps(trainer.args, 40), step_sizes(trainer.args, 40)
    trainer.train()
    assert trainer.state.max_steps == steps
    if not trainer.args.keeps_everything:
        first = next(entry for entry in trainer.state.log_history if "qtuning/pool_samples" in entry)
        assert (first["qtuning/pool_samples"], first["qtuning/kept_samples"]) == (candidates, survivors)


def test_a_pool_too_small_for_corners_warns_and_names_the_remedy(tmp_path, tokenizer, caplog):
    rows = Dataset.from_list(prompt_completion_rows(64))
    small = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer = make_trainer(tmp_path, tokenizer, rows, **small)
    trainer.train()
    assert "1 of 8 candidates is kept: a pool so small has hardly a sample in the corners Q2 and Q4" in caplog.text
    assert "set `gradient_accumulation_steps` to 4 for 32 candidates." in caplog.text
    for sound in (
        {**small, "gradient_accumulation_steps": 4},
        {**small, "sample_ratio": 1.0, "token_ratio": 0.5},
        {**small, "sample_pruner": "random"},
    ):
        assert "candidates" not in oddities(make_trainer(tmp_path, tokenizer, rows, **sound))
    one = make_trainer(tmp_path, tokenizer, rows, selection_scope="micro_batch")
    assert "set `selection_scope` to 'process'" in oddities(one)
    few = make_trainer(tmp_path, tokenizer, rows.select(range(6)))
    assert "give more rows, since 6 are fewer than the 32" in oddities(few)


def test_the_readmes_example_has_a_sound_pool(tmp_path):
    lines = (RECIPES.parent / "README.md").read_text().splitlines()
    (line,) = [text for text in lines if text.startswith("+") and "QTuningSFTConfig(" in text]
    config = line[line.index("QTuningSFTConfig(") :].split(")")[0] + ", use_cpu=True, bf16=False)"
    args = eval(config.replace('"out"', repr(str(tmp_path))))
    assert step_sizes(args, None) == (32, 4)


def test_short_answers_and_answers_without_an_end_are_unusual(tmp_path, tokenizer):
    pairs = [{"prompt": "ab", "completion": "c"}] * 40
    short = make_trainer(tmp_path, tokenizer, Dataset.from_list(pairs))
    assert "`token_ratio` is 0.5 and 40 of 40 answers are so short" in oddities(short)
    assert "half have 2 tokens or fewer" in oddities(short)
    assert "token_ratio" not in oddities(make_trainer(tmp_path, tokenizer, Dataset.from_list(pairs), token_ratio=1.0))
    endless = Dataset.from_list([{"input_ids": list(range(4, 14))}] * 30 + [{"input_ids": [*range(4, 14), 2]}] * 10)
    trainer = make_trainer(tmp_path, tokenizer, endless)
    assert "30 of 40 answers have no end token at their end" in oddities(trainer)


def test_conversations_labelled_as_a_whole_are_unusual(tmp_path, tokenizer):
    dataset = Dataset.from_list([{"messages": [USER, SAYS]}] * 40)
    assert "labelled as a whole" in oddities(make_trainer(tmp_path, tokenizer, dataset))
    assert "labelled as a whole" not in oddities(make_trainer(tmp_path, tokenizer, dataset, assistant_only_loss=True))


@pytest.mark.parametrize(("rows", "drop", "fits"), [(1, False, True), (3, True, False), (4, True, True)])
def test_a_stream_without_a_batch_is_refused(tmp_path, tokenizer, rows, drop, fits):
    stream = Dataset.from_list(prompt_completion_rows(4)).to_iterable_dataset().take(rows)
    options = {"max_steps": 2, "dataloader_drop_last": drop}
    if fits:
        trainer = make_trainer(tmp_path, tokenizer, stream, **options)
        trainer.train()
        assert trainer.state.global_step == 2
        return
    with pytest.raises(ValueError, match=r"a stream of 3 rows, fewer than a batch .* `dataloader_drop_last` drops"):
        make_trainer(tmp_path, tokenizer, stream, **options)


# The dry run


def test_the_dry_run_says_what_would_be_trained_and_trains_nothing(command, capsys, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(QTuningSFTTrainer, "train", lambda *_: pytest.fail("trained"))
    arguments = command("gaps.jsonl", "base", config=QUESTIONS)
    sft.run([*arguments, "--dry-run", "--budget", "25x50", "--scoring_batch_tokens", "2048"])
    printed = capsys.readouterr().out
    assert "Data: 5 rows, 3 of them left out (3 with an empty answer); 1 step of 2 candidates, about 1" in printed
    assert "Question: one plus one\nAnswer:⟦ two, which is the sum<|im_end|>⟧" in printed
    assert "Unusual: 1 of 2 candidates is kept" in printed
    assert re.search(
        r"Plan, counted for a GPU and not measured: [\d.]+ GiB at the peak .*, fits a card with 6 GB", printed
    )
    assert not (tmp_path / "run" / "qtuning_summary.json").exists()


def test_the_dry_run_goes_to_the_launched_processes(command, monkeypatch):  # noqa: F811
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    cli.main(["sft", *command("gaps.jsonl", "base", config=QUESTIONS), "--dry-run"])
    assert "--dry-run" in launched[0].training_script_args


def test_a_dry_run_shows_three_samples_and_nothing_unusual(tmp_path, tokenizer):
    rows = [{"prompt": "ab", "completion": "cdefgh"}] * 64
    options = {"per_device_train_batch_size": 8, "scoring_batch_tokens": 256}
    trainer = make_trainer(tmp_path, tokenizer, Dataset.from_list(rows), **options)
    drawn = torch.get_rng_state()
    text = describe(trainer)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert text.count("⟦") == 3 + 3  # three samples, each after a line that explains the marks
    assert "Nothing unusual." in text
    assert "Answers: 7 to 7 tokens" in text
    assert json.dumps(trainer.state.log_history) == "[]"


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 3, 8])
def test_counts_are_those_of_a_plain_loop(tmp_path, mode, max_length):
    generator = np.random.default_rng(0)
    args = QTuningSFTConfig(str(tmp_path), **{**COMMON, "max_length": max_length, "truncation_mode": mode})
    draw = generator.random
    rows = [
        [int(6 * draw()) if draw() < share else -100 for _ in range(generator.integers(20))]
        for share in generator.choice([0.0, 0.3, 1.0], 300)
    ]
    found = DataCheck()
    count_answers(found, Dataset.from_dict({"labels": rows}), args, {0, 1})
    expected = DataCheck()
    lengths = []
    for row in rows:
        window = row if max_length is None else row[-max_length:] if mode == "keep_end" else row[:max_length]
        whole, cut = ([token for token in part[1:] if token != -100] for part in (row, window))
        if not cut:
            expected.dropped["no tokens" if not row else CUT_WHOLE if whole else "no labelled token"] += 1
            continue
        lengths.append(len(cut))
        expected.cut += len(cut) < len(whole)
        expected.endless += not {0, 1} & {*whole[-3:]}
        expected.bare += max(1, len(cut) // 2) <= sum(token in (0, 1) for token in cut)
    assert found.answer_lengths.tolist() == lengths
    for name in ("dropped", "cut", "endless", "bare"):
        assert getattr(found, name) == getattr(expected, name), name
