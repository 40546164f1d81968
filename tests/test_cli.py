"""`qtuning sft` as a user runs it: recipes, overrides, launching, and one line for each kind of bad input."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import prompt_completion_rows
from transformers import AutoTokenizer, LlamaForCausalLM

from qtuning_trl import cli
from qtuning_trl.scripts import sft


@pytest.fixture
def recipe(tmp_path, model_dir):
    """Writes a small recipe that runs, with changes; returns its path."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in prompt_completion_rows(24)))

    def write(**changes) -> str:
        keys = {
            "model_name_or_path": model_dir,
            "datasets": [{"path": "json", "data_files": str(data)}],
            "use_peft": True,
            "lora_target_modules": "all-linear",
            "budget": "25x50",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "use_cpu": True,
            "bf16": False,
            "eval_strategy": "no",
            "report_to": "none",
            "learning_rate": "1e-3",  # as YAML reads 1e-3
            "output_dir": str(tmp_path / "run"),
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
        return str(path)

    return write


@pytest.fixture(autouse=True)
def one_line_errors(monkeypatch):
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_command_trains_by_a_recipe_with_overrides(tmp_path, recipe):
    done = run("-m", "qtuning_trl", "sft", "--config", recipe(num_processes=1), "--budget", "50x70", "--seed", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        f"Adapter saved to {tmp_path / 'run'}; what was kept: {tmp_path / 'run' / 'qtuning_summary.json'}"
        in done.stdout
    )
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "qtuning_summary.json", "README.md"} <= files
    summary = json.loads((tmp_path / "run" / "qtuning_summary.json").read_text())
    assert (summary["steps"], summary["candidates"], summary["kept"]) == (2, 16, 8)
    assert summary["config"]["seed"] == 3
    assert summary["config"]["learning_rate"] == 1e-3
    assert "2509.23873" in (tmp_path / "run" / "README.md").read_text()


def test_accelerate_launches_the_module_on_two_processes(tmp_path, recipe):
    done = run(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "qtuning_trl.scripts.sft", "--config", recipe(), "--selection_scope", "all_processes",
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "qtuning_summary.json").read_text())
    assert (summary["num_processes"], summary["candidates"], summary["kept"]) == (2, 24, 6)  # 16 + 8, a quarter each


def errors(text: str) -> list[str]:
    assert "Traceback" not in text
    return [line for line in text.splitlines() if "error:" in line]


def test_bad_data_is_said_once_by_two_processes_and_the_launchers_add_nothing(recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    path = recipe(dataset_name=str(rows), datasets=None, max_length=1, multi_gpu=True, main_process_port=0)
    done = run("-m", "qtuning_trl", "sft", "--config", path, "--num_processes", "2", ACCELERATE_USE_CPU="true")
    assert done.returncode == 2
    assert errors(done.stderr) == [
        "qtuning: error: `max_length` is 1: it cuts off the whole answer of each of the 1 rows; raise it, or shorten "
        "the prompts."
    ]


def test_a_run_that_fails_exits_with_1(recipe, model_dir, tmp_path):
    broken = tmp_path / "broken"
    model = LlamaForCausalLM.from_pretrained(model_dir)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(broken)
    done = run("-m", "qtuning_trl", "sft", "--config", recipe(model_name_or_path=str(broken), num_processes=1))
    assert done.returncode == 1
    assert len(errors(done.stderr)) == 1
    assert "qtuning: error: Step 1: 8 of 8 candidates have a NaN or infinite score" in done.stderr


def test_a_traceback_is_shown_where_asked_for(recipe, monkeypatch):
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "0")
    with pytest.raises(ValueError, match="is no known option"):
        cli.main(["sft", "--config", recipe(sampel_ratio=0.5), "--traceback"])


def refusal(capsys, call, *arguments) -> str:
    """The one line that a call ends with, and nothing else like it."""
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    assert end.value.code == 2
    (line,) = errors(capsys.readouterr().err)
    return line


BAD_RECIPES = [
    ({"sampel_ratio": 0.5}, "`sampel_ratio: 0.5` in {path} is no known option: did you mean `sample_ratio`?"),
    ({"num_proceses": 2}, "did you mean `num_processes`?"),
    ({"torch_dtype": "bfloat16"}, "did you mean `dtype`?"),
    ({"dataset_mixture": []}, "did you mean `datasets`?"),
    ({"zzz": 1}, "`zzz: 1` in {path} is no known option: `qtuning sft --help-all` lists those there are."),
    ({"budget": "lots"}, "`budget` is 'lots': give samples x tokens in per cent, such as '12.5x50'."),
    ({"sample_ratio": 0.5}, "`budget` is '25x50' and `sample_ratio` is 0.5: they disagree"),
    ({"budget": None, "sample_ratio": 12.5}, "`sample_ratio` is 12.5: give a share greater than 0 and at most 1"),
    ({"budget": None, "sample_ratio": "lots"}, "`sample_ratio` in {path} is 'lots': give a number."),
    ({"budget": None, "sample_ratio": [1]}, "`sample_ratio` in {path} is [1]: give a number."),
    ({"learning_rate": True}, "`learning_rate` in {path} is True: give a number."),
    ({"seed": 1.5}, "`seed` in {path} is 1.5: give a whole number."),
    ({"use_peft": "maybe"}, "`use_peft` in {path} is 'maybe': give true or false."),
    ({"token_pruning": "delete"}, "`token_pruning` in {path} is 'delete': give one of mask, drop, loss."),
    ({"dtype": "bf16"}, "`dtype` in {path} is 'bf16': give one of auto, bfloat16, float16, float32."),
    ({"num_processes": "two"}, "num_processes"),
    ({"multi_gpu": "both"}, "`multi_gpu` is 'both': give true or false."),
    ({"datasets": [{"path": "json", "data_file": "x"}]}, "an entry has no `data_file`, give `data_files`."),
    ({"datasets": "x.json"}, "`datasets` in {path} is 'x.json': give a list of entries"),
    ({"datasets": [{"path": "json"}]}, "`datasets` has the `path` 'json' alone: name the local files"),
    ({"datasets": [{"path": "json", "data_files": "nope.jsonl"}]}, "`data_files` 'nope.jsonl': no such file"),
    ({"datasets": None, "dataset_name": "./nope.jsonl"}, "`dataset_name` is './nope.jsonl': no such file"),
    ({"datasets": None}, "`dataset_name` is not given: name a data set or a local file"),
    ({"model_name_or_path": "./nope"}, "`model_name_or_path` is './nope': no such folder"),
    ({"model_name_or_path": None}, "`model_name_or_path` is not given"),
    ({"chat_template_path": "nope.jinja"}, "`chat_template_path` is 'nope.jinja': no such file"),
    ({"resume_from_checkpoint": True}, "`resume_from_checkpoint` is true and `output_dir` '"),
    ({"resume_from_checkpoint": "nope"}, "`resume_from_checkpoint` is 'nope': no such folder"),
    ({"accelerate_config": "nope"}, "Accelerate config nope is neither a file nor a valid config"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_RECIPES)
def test_bad_recipes_end_in_one_line_before_anything_is_launched(recipe, capsys, monkeypatch, changes, message):
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda *_: pytest.fail("launched"))
    path = recipe(**changes)
    assert message.format(path=path) in refusal(capsys, cli.main, ["sft", "--config", path])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "`--config` is 'nowhere.yaml': give the path of a recipe (No such file"),
        (["--config=nowhere.yaml"], "`--config` is 'nowhere.yaml'"),
        (["--config", "."], "`--config` is '.': give the path of a recipe"),
        (["--config"], "--config: expected one argument"),
        (["--config", "demo", "--config", "b"], "`--config` is 'b': give the path of a recipe"),
        (["nowhere.yaml"], "`nowhere.yaml` belongs to no option: give options as `--config nowhere.yaml`."),
        (["--sample_ration", "0.5"], "`--sample_ration` is no known option: did you mean `--sample_ratio`?"),
        (["--num-process=2"], "`--num-process=2` is no known option: did you mean `--num_processes`?"),
        (["--num_processes"], "`--num_processes` has no value"),
        (["--sample_ratio", "half"], "--sample_ratio/--sample-ratio: invalid float value: 'half'"),
        (["--token_pruning", "delete"], "invalid choice: 'delete'"),
    ],
)
def test_bad_command_lines_end_in_one_line(capsys, arguments, message):
    named = [] if "--config" in str(arguments) else ["--model_name_or_path", "a/b", "--dataset_name", "c/d"]
    assert message in refusal(capsys, cli.main, ["sft", *arguments, *named, "--use_cpu"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": "nobody/nothing"}, "`model_name_or_path` is 'nobody/nothing', which cannot be loaded"),
        ({"datasets": None, "dataset_name": "nobody/none"}, "`dataset_name` is 'nobody/none', which cannot be used"),
        (
            {"dataset_train_split": "tran"},
            "`dataset_train_split` is 'tran': choose one of the splits there are (train)",
        ),
        ({"eval_strategy": "epoch"}, "`dataset_test_split` is 'test': choose one of the splits there are, set"),
        ({"prompt_template": "{q}"}, "`completion_template` is not given"),
        ({"prompt_template": "{q}", "completion_template": "{a}"}, "`prompt_template` names the column 'q'"),
        ({"messages_column": "chat"}, "`messages_column` names the column 'chat'"),
        ({"group_column": "chat"}, "`group_column` is 'chat': choose one of the dataset's columns"),
        ({"streaming": True, "max_steps": -1}, "`max_steps` is -1 and `train_dataset` is streamed"),
        ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy` is 'wrapped'"),
    ],
)
def test_what_only_the_script_can_see_ends_in_one_line_too(recipe, capsys, changes, message):
    assert message in refusal(capsys, sft.run, ["--config", recipe(**changes)])


def test_launch_options_after_the_module_are_refused(recipe, capsys):
    line = refusal(capsys, sft.run, ["--config", recipe(), "--num_processes", "2"])
    assert "`--num_processes` is an option of `accelerate launch`: give it before `-m" in line


def test_launch_options_go_to_accelerate_and_the_rest_to_the_script(recipe, monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    path = recipe(num_processes=2, main_process_port=0, multi_gpu=True, use_deepspeed=False, mixed_precision=False)
    arguments = ["--seed", "2", "--num_machines=2", "--config", path, "--budget=50x70", "--machine_rank", "2"]
    assert cli.main(["sft", *arguments]) == 0
    (given,) = launched
    assert (given.num_processes, given.num_machines, given.machine_rank, given.mixed_precision) == (2, 2, 2, "no")
    assert (given.multi_gpu, given.use_deepspeed, given.main_process_port) == (True, False, 0)
    assert (given.module, given.training_script) == (True, sft.MODULE)
    assert given.training_script_args == ["--config", path, "--seed", "2", "--budget=50x70"]


def test_a_run_on_a_cpu_has_all_its_cores(tmp_path, monkeypatch, capfd):
    """accelerate would leave it one; two processes share them."""
    (tmp_path / "count_threads.py").write_text("import torch\nprint('threads', torch.get_num_threads())\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert cli.launch(["--module", "count_threads"]) == 0
    assert capfd.readouterr().out.split() == ["threads", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.launch(["--module", "count_threads"]) == 0
    assert capfd.readouterr().out.split() == ["threads", "1"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert cli.launch(["--num_processes", "2", "--multi_gpu", "--module", "count_threads"]) == 0
    assert launched[0].num_cpu_threads_per_process == 1


def test_trls_accelerate_configs_are_known(recipe, monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert cli.main(["sft", "--config", recipe(accelerate_config="multi_gpu")]) == 0
    assert launched[0].config_file.endswith("multi_gpu.yaml")


def test_values_are_those_of_the_recipe_and_the_command_line_wins(recipe, monkeypatch):
    monkeypatch.delenv("QTUNING_TEST", raising=False)
    path = recipe(env={"QTUNING_TEST": 3}, eval_strategy=False, report_to="none", lora_target_modules=["q_proj"])
    _, args, model_args, _ = sft.parse([f"--config={path}", "--seed", "3", "--max_length", "none"]).dataclasses
    assert os.environ.pop("QTUNING_TEST") == "3"
    assert (args.learning_rate, args.seed, args.max_length, args.eval_strategy) == (1e-3, 3, None, "no")
    assert model_args.lora_target_modules == "q_proj"
    assert sft.parse(["--config", path]).dataclasses[1].seed == 42  # nothing is left of an earlier parse


def test_resume_true_means_the_last_checkpoint(recipe, tmp_path):
    sft.run(["--config", recipe(save_strategy="steps", save_steps=1, max_steps=1)])
    sft.run(["--config", recipe(save_strategy="steps", save_steps=1, max_steps=2, resume_from_checkpoint=True)])
    summary = json.loads((tmp_path / "run" / "qtuning_summary.json").read_text())
    assert (summary["steps"], summary["candidates"]) == (2, 16)


def test_evaluation_on_a_split_that_is_cut_off(recipe, tmp_path):
    sft.run(["--config", recipe(test_split_size=0.25, eval_strategy="steps", eval_steps=1, max_steps=1)])
    assert "eval_loss" in (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text()


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert (end.value.code, capsys.readouterr().out.split()[0]) == (0, "qtuning-trl")
    done = run("-m", "qtuning_trl")
    assert done.returncode == 0
    assert "qtuning sft --config recipe.yaml" in done.stdout
    assert "QTUNING_TRACEBACK=1" in done.stdout


def test_the_help_of_sft_lists_our_options_and_trls(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["sft", "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    for option in ("config", "sample_ratio", "prompt_template", "lora_r", "per_device_train_batch_size"):
        assert f"--{option}" in printed
    assert "QTUNING_TRACEBACK=1" in printed
