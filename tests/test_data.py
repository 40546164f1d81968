"""Mapping the columns of data sets as they come to what TRL takes; loading local files."""

import json

import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig, ScriptArguments

from qtuning_trl.data import Template, load_data, map_columns, normalize_messages, pick_split

ALPACA = [
    {"instruction": "add", "input": "1 2", "output": "3", "source": "a"},
    {"instruction": "greet", "input": "", "output": "hello", "source": "b"},
]
QUESTION = {"prompt_template": "Question: {instruction}\n{input}\nAnswer:", "completion_template": " {output}"}


@pytest.mark.parametrize("stream", [False, True])
def test_templates_build_prompt_and_completion_and_keep_other_columns(stream):
    dataset = Dataset.from_list(ALPACA)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    assert list(map_columns(dataset, **QUESTION)) == [
        {"source": "a", "prompt": "Question: add\n1 2\nAnswer:", "completion": " 3"},
        {"source": "b", "prompt": "Question: greet\nAnswer:", "completion": " hello"},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_columns_that_are_already_called_prompt_and_completion_are_rebuilt(stream):
    dataset = Dataset.from_list([{"prompt": "a", "completion": "b", "text": "c"}])
    dataset = dataset.to_iterable_dataset() if stream else dataset
    mapped = map_columns(dataset, prompt_template="Q: {prompt}", completion_template="{completion}!")
    assert list(mapped) == [{"prompt": "Q: a", "completion": "b!"}]


def test_a_column_to_keep_is_kept_though_it_is_used():
    mapped = map_columns(Dataset.from_list(ALPACA), **QUESTION, keep=("instruction", None))
    assert set(mapped.column_names) == {"instruction", "source", "prompt", "completion"}


def test_nothing_to_map_is_nothing_done():
    dataset = Dataset.from_list(ALPACA)
    assert map_columns(dataset) is dataset


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_conversations_become_messages(column, stream):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    roles = ["system", "user", "assistant"]
    expected = [{"role": role, "content": turn["value"]} for role, turn in zip(roles, turns, strict=True)]
    assert normalize_messages(turns) == expected
    assert normalize_messages(expected) == expected
    dataset = Dataset.from_list([{column: turns, "source": "x"}])
    dataset = dataset.to_iterable_dataset() if stream else dataset
    assert list(map_columns(dataset, messages_column=column)) == [{"source": "x", "messages": expected}]


@pytest.mark.parametrize(
    ("text", "row", "rendered"),
    [
        ("{a}", {"a": None}, ""),
        ("x\n\n{a} {b}", {"a": None, "b": 1}, "x\n\n 1"),
        ("### In:\n{a}\n\n### Out:\n", {"a": " "}, "### Out:\n"),
        ("{a}\n{b}\nend", {"a": "1", "b": ""}, "1\nend"),
        ("{{literal}} {a}", {"a": "{b}"}, "{literal} {b}"),
        ("{my column}", {"my column": "x"}, "x"),
    ],
)
def test_empty_columns_take_their_line_or_paragraph_with_them(text, row, rendered):
    assert Template(text).render(row) == rendered


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_template": "{question}", "completion_template": "{output}"}, r"names the column 'question'.*source"),
        ({"prompt_template": "{instruction}"}, "`completion_template` is not given"),
        ({"completion_template": "{output}"}, "`prompt_template` is not given"),
        (
            {"prompt_template": "{instruction}", "completion_template": "{output}"},
            "column 'input', filled in",
        ),
        ({"messages_column": "output", "prompt_template": "{input}"}, "give only one of the two"),
        ({"messages_column": "chat"}, "`messages_column` names the column 'chat'"),
        (
            {"prompt_template": "{instruction", "completion_template": "{output}"},
            r"`prompt_template` is '{instruction'",
        ),
        ({"prompt_template": "{}", "completion_template": "{output}"}, "no plain column name"),
        ({"prompt_template": "fixed", "completion_template": "{output}"}, "name a column in braces"),
    ],
)
def test_bad_mappings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        map_columns(Dataset.from_list(ALPACA), **options)


def test_an_unknown_speaker_is_refused():
    with pytest.raises(ValueError, match="the role 'narrator'"):
        normalize_messages([{"from": "narrator", "value": "x"}])


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ALPACA * 4))
    return str(path)


def test_a_local_file_is_a_dataset_name_or_a_path(file):
    by_name = load_data(ScriptArguments(dataset_name=file), DatasetMixtureConfig())
    by_path = load_data(ScriptArguments(), DatasetMixtureConfig(datasets=[{"path": file}]))
    by_format = load_data(ScriptArguments(), DatasetMixtureConfig(datasets=[{"path": "json", "data_files": file}]))
    assert by_name["train"].to_list() == by_path["train"].to_list() == by_format["train"].to_list() == ALPACA * 4


def test_a_test_split_is_cut_off_in_either_case(file):
    for script_args, datasets in ((ScriptArguments(dataset_name=file), []), (ScriptArguments(), [{"path": file}])):
        splits = load_data(script_args, DatasetMixtureConfig(datasets=datasets, test_split_size=0.25))
        assert {name: len(split) for name, split in splits.items()} == {"train": 6, "test": 2}


def test_a_test_split_is_cut_off_any_split(tmp_path):
    """Of data with a split 'test' alone the larger part is trained on, not the one that is evaluated."""
    Dataset.from_list(ALPACA * 4).to_parquet(tmp_path / "test.parquet")
    script_args = ScriptArguments(dataset_name=str(tmp_path), dataset_train_split="test")
    splits = load_data(script_args, DatasetMixtureConfig(test_split_size=0.25))
    assert len(splits[script_args.dataset_train_split]) == 6
    assert len(splits[script_args.dataset_test_split]) == 2


def test_what_cannot_be_loaded_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match=r"`dataset_test_split` is 'test'.*`eval_strategy` to 'no' \(train\)"):
        pick_split(load_data(ScriptArguments(dataset_name=file), DatasetMixtureConfig()), "test", "dataset_test_split")
    mixture = DatasetMixtureConfig(test_split_size=0.5)
    with pytest.raises(ValueError, match=r"`test_split_size` is 0\.5 and the data is streamed"):
        load_data(ScriptArguments(dataset_name=file, dataset_streaming=True), mixture)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"`dataset_name` is '.*broken\.json', which cannot be read: line 1 of"):
        load_data(ScriptArguments(dataset_name=str(tmp_path / "broken.json")), DatasetMixtureConfig())
