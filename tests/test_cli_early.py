"""What a user gets wrong first: each in one sentence, most of them before anything heavy is imported."""

import dataclasses
import subprocess
import sys

import pytest
from test_cli import errors, recipe, refusal, run  # noqa: F401 (a fixture)

from qtuning_trl import QTuningSFTConfig, cli, names
from qtuning_trl.early import check_early
from qtuning_trl.scripts import score, sft

HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "numpy"}


def test_a_typo_answers_in_under_two_seconds():
    """Of the processor, since the machine that tests may be busy; the libraries alone take five."""
    code = (
        "import resource, sys\nfrom qtuning_trl import cli\n"
        "try:\n    cli.main(['sft', '--config', 'demo', '--sampel_ratio', '0.5'])\n"
        "except SystemExit as end:\n    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    print(end.code, used.ru_utime + used.ru_stime, *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    status, seconds, *modules = done.stdout.split()
    assert done.stderr == "qtuning: error: `--sampel_ratio` is no known option: did you mean `--sample_ratio`?\n"
    assert status == "2"
    assert not HEAVY & set(modules)
    assert float(seconds) < 2


@pytest.mark.parametrize(("name", "script"), [("sft", sft), ("score", score)])
def test_the_names_read_from_the_sources_are_those_of_the_parser(name, script):
    from accelerate.commands.launch import launch_command_parser

    parser = {action.dest for action in script.make_parser()._actions} - {"help", "help_all"}
    launcher = {action.dest for action in launch_command_parser()._actions}
    known = names.known_names(name)
    assert parser <= known
    more = known - parser - launcher - set(names.OTHERS)  # fields of an entry of `datasets`, aliases, the launcher's
    assert len(more) < 20


def test_a_library_that_is_built_otherwise_is_left_to_the_parser(monkeypatch):
    monkeypatch.setattr(names, "DATACLASSES", names.DATACLASSES[1:])  # SFTConfig's base is in no file that is read
    assert names.known_names("sft") is None
    monkeypatch.setattr(names, "DATACLASSES", (("trl", "no_such_file.py"),))
    assert names.known_names("sft") is None


def test_every_translation_is_an_option_and_no_option_is_translated():
    parser = {action.dest for action in sft.make_parser()._actions}
    assert {meant.split(",")[0] for meant in names.MEANT.values()} <= parser
    assert not parser & {*names.MEANT, *names.NOT_NEEDED}


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("warmup_ratio", "did you mean `warmup_steps`, which below 1 is a share of the steps?"),
        ("lora_rank", "did you mean `lora_r`?"),
        ("cutoff_len", "did you mean `max_length`?"),
        ("micro_batch_size", "did you mean `per_device_train_batch_size`?"),
        ("base_model", "did you mean `model_name_or_path`?"),
        ("sequence_len", "did you mean `max_length`?"),
        ("val_size", "did you mean `test_split_size`?"),
        ("stage", "leave it out, nothing here needs it."),
        ("learning_rat", "did you mean `learning_rate`?"),
        ("freeze_trainable_layers", "`qtuning sft --help-all` lists those there are."),
        ("local_ranking", "`qtuning sft --help-all` lists those there are."),
    ],
)
def test_a_suggestion_helps_or_is_not_made(capsys, recipe, given, answer):  # noqa: F811
    path = recipe(**{given: 1})
    assert refusal(capsys, cli.main, ["sft", "--config", path]) == (
        f"qtuning: error: `{given}: 1` in {path} is no known option: {answer}"
    )


VALUES = [
    ({"budget": "0.125x0.5"}, "`budget` is '0.125x0.5', which looks like shares: give per cent, here '12.5x50', or"),
    ({"budget": "1x1"}, "`budget` is '1x1', which looks like shares: give per cent, here '100x100', or"),
    ({"budget": "125x50"}, "`budget` is '125x50': give at most 100 per cent of the samples, as in '12.5x50'."),
    ({"budget": "25x200"}, "`budget` is '25x200': give at most 100 per cent of the tokens"),
    ({"budget": "0x50"}, "`budget` is '0x50': give more than 0 per cent of samples and of tokens"),
    ({"num_train_epochs": 0, "max_steps": -1}, "`num_train_epochs` is 0: give a number greater than 0, or `max_steps`"),
    ({"max_steps": 0}, "`max_steps` is 0: give the number of optimizer steps, or leave it out"),
    ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0: give a whole number of at least 1."),
    ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` is 0: give a whole number of at least 1."),
    ({"pool_factor": 1.5}, "`pool_factor` is 1.5: give a whole number of at least 1."),
]


@pytest.mark.parametrize(("changes", "message"), VALUES)
def test_values_that_cannot_be_meant(recipe, changes, message):  # noqa: F811
    """At once by the command, from the recipe or typed, and by the configuration in Python."""
    with pytest.raises(ValueError, match="is") as early:
        check_early(["--config", recipe(**changes)], "sft")
    assert message in str(early.value)
    typed = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    with pytest.raises(ValueError, match="is") as early:
        check_early(["--config", recipe(), *typed], "sft")
    assert message in str(early.value)
    with pytest.raises(ValueError, match="is") as late:
        QTuningSFTConfig("out", use_cpu=True, bf16=False, **changes)
    assert message in str(late.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbor_weight": "0.5"}, "`neighbor_weight` is '0.5': give one number, a weight from 0 to 1"),
        ({"neighbor_weight": None}, "`neighbor_weight` is None: give one number"),
        ({"neighbor_weight": float("nan")}, "`neighbor_weight` is nan: give a weight from 0 to 1"),
        ({"infobatch_annealing": "0.1"}, "`infobatch_annealing` is '0.1': give one number"),
        ({"scored_share": None}, "`scored_share` is None: give one number"),
        ({"record_tokens": "all"}, "`record_tokens` is 'all': give one number"),
        ({"sample_ratio": True}, "`sample_ratio` is True: give one number"),
        ({"token_ratio": "0.5"}, "`token_ratio` is '0.5': give one number"),
        ({"pool_factor": "2"}, "`pool_factor` is '2': give a whole number of at least 1."),
        ({"pool_factor": float("nan")}, "`pool_factor` is nan: give a whole number of at least 1."),
        ({"pool_factor": None}, "`pool_factor` is None: give a whole number of at least 1."),
        ({"scoring_batch_tokens": 10.5}, "`scoring_batch_tokens` is 10.5: give a whole number of at least 1, or leave"),
        ({"score_reuse_epochs": "2"}, "`score_reuse_epochs` is '2': give a whole number of at least 1, or leave"),
        ({"score_reuse_steps": True}, "`score_reuse_steps` is True: give a whole number of at least 1, or leave"),
        ({"protect_special_tokens": "no"}, "`protect_special_tokens` is 'no': give true or false."),
        ({"record": 1}, "`record` is 1: give true or false."),
        ({"score_column": 3}, "`score_column` is 3: give a name (a text), or leave it out."),
        ({"fp16": True, "bf16": None}, "`fp16` is true and the run is on a CPU, which cannot: leave it out"),
    ],
)
def test_wrong_types_in_python_are_refused_in_one_sentence(tmp_path, options, message):
    with pytest.raises(ValueError, match="is") as error:
        QTuningSFTConfig(str(tmp_path), **{"use_cpu": True, "bf16": False, **options})
    assert message in str(error.value)


def test_bf16_without_a_gpu_names_both_remedies(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="`--bf16 false`, or to train on the CPU `--use_cpu`"):
        QTuningSFTConfig(str(tmp_path))
    with pytest.raises(ValueError, match="`max_steps` is 0"):  # what is wrong everywhere comes first
        QTuningSFTConfig(str(tmp_path), max_steps=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datasets": None, "dataset_name": "x.tsv"}, "`dataset_name` is 'x.tsv': tab-separated values are not read"),
        ({"datasets": None, "dataset_name": "x.xlsx"}, "`dataset_name` is 'x.xlsx': Excel's files are not read; save"),
        ({"datasets": [{"path": "csv", "data_files": "x.tsv"}]}, "the `data_files` 'x.tsv': tab-separated values are"),
        ({"model_name_or_path": "{tmp}/adapter"}, "which holds an adapter: give its base model, 'base/model', or make"),
        ({"model_name_or_path": "{tmp}"}, "', which holds no config.json: give the folder of a model"),
        ({"resume_from_checkpoint": "{tmp}/run"}, "which is no checkpoint (it holds no trainer_state.json): give one "),
        ({"resume_from_checkpoint": "{tmp}"}, "which is no checkpoint (it holds no trainer_state.json): give a folder"),
        ({"output_dir": "{tmp}/data.jsonl"}, "data.jsonl is a file: give a folder."),
        ({"output_dir": "{tmp}/data.jsonl/run"}, "data.jsonl is a file: give a folder."),
    ],
)
def test_files_and_folders_that_cannot_be_meant(recipe, tmp_path, changes, message):  # noqa: F811
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base/model"}')
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    filled = {k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=r"is|has") as error:
        check_early(["--config", recipe(**filled)], "sft")
    assert message in str(error.value)


def test_equal_keys_in_a_recipe_are_refused(tmp_path, capsys):
    path = tmp_path / "twice.yaml"
    path.write_text("budget: 25x50\nseed: 1\nbudget: 50x70\n")
    assert refusal(capsys, cli.main, ["sft", "--config", str(path)]) == (
        f"qtuning: error: `--config` is '{path}', which has `budget` twice, in lines 1 and 3: remove one of them."
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n',
            "cannot be read: line 2 of {path} is no JSON (Expecting property name enclosed in double quotes): mend",
        ),
        (
            "rows.json",
            b'[{"prompt": "a", "completion": "b"},\n{"prompt" "a"}]',
            "cannot be read: line 2 of {path} is no JSON (Expecting ':' delimiter): mend it",
        ),
        (
            "rows.csv",
            "prompt,completion\na,b\ncafé,b\n".encode("latin-1"),
            "cannot be read: line 3 of {path} is not UTF-8, perhaps Latin-1 or Windows-1252: save the file as UTF-8",
        ),
    ],
)
def test_a_broken_data_file_is_told_with_the_line(recipe, tmp_path, capsys, name, content, message):  # noqa: F811
    path = tmp_path / name
    path.write_bytes(content)
    for data in ({"datasets": None, "dataset_name": str(path)}, {"datasets": [{"path": str(path)}]}):
        assert message.format(path=path) in refusal(capsys, sft.run, ["--config", recipe(**data)])


def test_a_column_of_text_is_no_column_of_messages(recipe, capsys):  # noqa: F811
    line = refusal(capsys, sft.run, ["--config", recipe(messages_column="prompt")])
    assert "`messages_column` names the column 'prompt', which holds text: give a column of conversations" in line


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("scipy", ["compare", "--config", "x.yaml"], "comparisons need scipy, which is not installed: pip install "),
        (
            "bitsandbytes",
            ["sft", "--config", "smollm2-1.7b-qlora"],
            "bitsandbytes is missing: pip install 'qtuning-trl",
        ),
    ],
)
def test_missing_extras_are_named(module, arguments, message):
    hide = f"import importlib.util as u, sys; sys.modules['{module}'] = None; find = u.find_spec; "
    hide += f"u.find_spec = lambda name, *a: None if name == '{module}' else find(name, *a); "
    done = run("-c", f"{hide}from qtuning_trl.cli import main; main({arguments!r})")
    assert done.returncode == 2
    (line,) = errors(done.stderr)
    assert message in line


def test_one_process_on_a_cpu_is_said(recipe, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda *_: None)
    path = recipe()
    assert cli.main(["sft", "--config", path, "--num_processes", "2", "--cpu"]) == 0
    assert "`num_processes` is 2, and accelerate starts one process on a CPU; for 2: ACCELERATE_USE_CPU=true" in (
        capsys.readouterr().err
    )
    assert cli.main(["sft", "--config", path, "--num_processes", "2", "--multi_gpu"]) == 0
    assert cli.main(["sft", "--config", path, "--num_processes", "1"]) == 0
    assert capsys.readouterr().err == ""


def test_help_shows_ours_first_and_each_option_once(capsys):
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            cli.main(["sft", flag])
        assert end.value.code == 0
        shown[flag] = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert shown["--help"][:4] == ["--config", "--help_all", "--dry_run", "--budget"]
    assert "--adam_beta1" not in shown["--help"]
    assert "--adam_beta1" in shown["--help-all"]
    assert len(set(shown["--help-all"])) == len(shown["--help-all"])
    fields = {f"--{field.name}" for field in dataclasses.fields(QTuningSFTConfig) if field.init}
    assert fields <= set(shown["--help-all"])


@pytest.mark.parametrize("name", ["sample_ratio", "token_ratio"])
def test_a_share_that_is_the_default_is_no_less_given(name, recipe, capsys):  # noqa: F811
    """`budget` says 25x25: a default of 0.125 or 0.5 that is typed must not be taken for one that is not."""
    default = {"sample_ratio": 0.125, "token_ratio": 0.5}[name]
    with pytest.raises(ValueError, match=rf"`budget` is '25x25' and `{name}` is {default}: they disagree"):
        check_early(["--config", recipe(budget="25x25"), f"--{name}", str(default)], "sft")
    check_early(["--config", recipe(budget="25x25"), f"--{name}", "0.25"], "sft")
    pruner = name.replace("ratio", "pruner")
    check_early(["--config", recipe(budget="25x25"), f"--{name}", str(default), f"--{pruner}", "none"], "sft")
