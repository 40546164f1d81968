"""Without a clone, and after training: shipped recipes, the wheel, the demo, merging, completion."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import prompt_completion_rows, tiny_llama
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from test_cli import recipe, refusal, run  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtuning_trl import cli, recipe_files
from qtuning_trl.recipe_files import find_recipe, load_recipe, recipe_paths, shipped_names
from qtuning_trl.scripts import completion, sft
from qtuning_trl.scripts.merge import merge

ROOT = Path(__file__).parents[1]


def test_a_shipped_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = recipe_files.SHIPPED / "smollm2-1.7b-lora.yaml"
    for name in ("smollm2-1.7b-lora", "smollm2-1.7b-lora.yaml", "recipes/smollm2-1.7b-lora.yaml"):
        assert find_recipe(name) == shipped
    assert load_recipe("smollm2-1.7b-lora")["model_name_or_path"] == "HuggingFaceTB/SmolLM2-1.7B"
    (tmp_path / "own.yaml").write_text("base: [smollm2-1.7b-lora, data/openhermes]\nseed: 7\n")
    own = load_recipe("own.yaml")
    assert (own["seed"], own["dataset_name"]) == (7, "teknium/OpenHermes-2.5")
    (tmp_path / "smollm2-1.7b-lora").write_text("seed: 3\n")  # a file that exists comes first
    assert load_recipe("smollm2-1.7b-lora") == {"seed": 3}
    assert not find_recipe("../recipes/demo").is_file()


def test_a_base_is_looked_for_beside_the_recipe_and_then_among_the_shipped(tmp_path, monkeypatch):
    """Not in the current folder, where a clone has files of the same names."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "own.yaml").write_text("base: [recipes/smollm2-1.7b-lora.yaml, data/openhermes]\n")
    assert load_recipe(tmp_path / "own.yaml") == load_recipe("smollm2-1.7b-lora") | load_recipe("data/openhermes")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "smollm2-1.7b-lora.yaml").write_text("seed: 3\n")
    (tmp_path / "own.yaml").write_text("base: smollm2-1.7b-lora.yaml\n")
    assert load_recipe(tmp_path / "own.yaml")["model_name_or_path"] == "HuggingFaceTB/SmolLM2-1.7B"


def test_a_misspelt_recipe_is_suggested(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, cli.main, ["sft", "--config", "smollm2-1.7b-lor"])
    assert line.endswith("(No such file or directory), did you mean 'smollm2-1.7b-lora'?")


def test_recipes_are_listed_with_card_planned_peak_model_and_data(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines if line}
    parts = {"base", "qlora", "importance", "paper/base", "paper/table2"}
    assert set(shipped_names()) - parts <= listed
    table = (ROOT / "recipes" / "README.md").read_text().splitlines()
    for name, model in (("smollm2-1.7b-qlora", "SmolLM2-1.7B"), ("paper/smollm2-1.7b-mathinstruct", "SmolLM2-1.7B")):
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        (row,) = (row for row in table if row.startswith(f"| `{name}` "))
        peak = row.split("|")[3].strip()  # `qtuning plan --recipes` wrote it
        assert line.split()[-4:-2] == [peak, "GiB"]
        assert line.split()[-2:] == [f"HuggingFaceTB/{model}", "TIGER-Lab/MathInstruct"]
    planned = {line.split()[0] for line in lines if " GiB " in line}
    assert planned == {
        str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in recipe_paths(ROOT / "recipes")
    }


def test_a_recipe_is_copied_from_within_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("demo", "demo.yaml", "recipes/demo.yaml"):
        assert cli.main(["recipes", "copy", name, str(tmp_path / name.replace("/", "-"))]) == 0


@pytest.mark.parametrize("name", ["llama-3.2-1b-qlora", "paper/mistral-7b-wizardlm", "demo", "data/openhermes"])
def test_a_copied_recipe_is_the_same_and_stands_alone(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "copy", name, "own.yaml"]) == 0
    assert ("qtuning sft --config own.yaml" in capsys.readouterr().out) == (name != "data/openhermes")
    raw = yaml.safe_load(Path("own.yaml").read_text())
    assert "base" not in raw
    shipped, own = load_recipe(name), load_recipe(tmp_path / "own.yaml")
    for recipe_ in (shipped, own):
        for option in ("chat_template_path", "fallback_chat_template"):
            template = recipe_.get(option)
            recipe_[option] = Path(template).read_text() if template else None
    assert own == shipped
    assert refusal(capsys, cli.main, ["recipes", "copy", name, "own.yaml"]).count("which is there already") == 1
    assert "give one that `qtuning recipes` lists" in refusal(capsys, cli.main, ["recipes", "copy", "no-such"])


def test_the_wheel_runs_without_a_clone(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    source = tmp_path / "source"
    for name in files:
        if name.startswith(("qtuning_trl/", "recipes/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from qtuning_trl import recipe_files as r; print(r.SHIPPED, *r.shipped_names(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    folder, *shipped = done.stdout.split("\n")[:-1]
    assert folder == str(tmp_path / "site" / "qtuning_trl" / "shipped_recipes")
    assert shipped == shipped_names()
    templates = {path.name for path in Path(folder).glob("*.jinja")}
    assert templates == {path.name for path in (ROOT / "recipes").glob("*.jinja")}
    metadata = next((tmp_path / "site").glob("*.dist-info/METADATA")).read_text()
    assert "Project-URL: Paper, https://arxiv.org/abs/2509.23873" in metadata
    extras = {"quant", "compare", "eval", "report", "completion", "all"}
    assert all(f"Provides-Extra: {extra}\n" in metadata for extra in extras)


def test_the_demo_is_one_word(tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert cli.main(["demo", "--output_dir", str(tmp_path / "demo")]) == 0
    assert launched[0].training_script == sft.MODULE
    assert launched[0].training_script_args == ["--config", "demo", "--output_dir", str(tmp_path / "demo")]


def logits(model: torch.nn.Module, tokenizer) -> torch.Tensor:
    batch = tokenizer([row["prompt"] + row["completion"] for row in prompt_completion_rows(8)], padding=True)
    with torch.no_grad():
        return model.eval()(torch.tensor(batch["input_ids"])).logits


def test_merging_gives_the_model_that_was_trained(recipe, tmp_path, capsys):  # noqa: F811
    sft.run(["--config", recipe(learning_rate=0.05, dtype="float32", save_strategy="no")])
    run_dir = str(tmp_path / "run")
    assert cli.main(["merge", run_dir]) == 0
    merged_dir = tmp_path / "run" / "merged"
    assert f"Model saved to {merged_dir}" in capsys.readouterr().out
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in merged_dir.iterdir()}
    assert not (tmp_path / "run" / "merged.partial").exists()
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    merged, info = AutoModelForCausalLM.from_pretrained(merged_dir, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    adapted = AutoPeftModelForCausalLM.from_pretrained(run_dir)
    base = adapted.get_base_model()
    expected = logits(adapted, tokenizer)
    torch.testing.assert_close(logits(merged, tokenizer), expected, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert (logits(base, tokenizer) - expected).abs().max() > 0.05, "the adapter does something"
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run_dir).chat_template
    line = refusal(capsys, cli.main, ["merge", run_dir])
    assert line == f"qtuning: error: `--output` is '{merged_dir}', which is there already: give another folder, or " \
        "remove it."  # fmt: skip


def test_merging_into_another_dtype_and_from_a_base_that_has_moved(recipe, tmp_path):  # noqa: F811
    sft.run(["--config", recipe(save_strategy="no")])
    config = tmp_path / "run" / "adapter_config.json"
    fields = json.loads(config.read_text())
    base, fields["base_model_name_or_path"] = fields["base_model_name_or_path"], "gone/nowhere"
    config.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"the base model is 'gone/nowhere', which cannot be loaded .*as `--base`"):
        merge(str(tmp_path / "run"))
    output = merge(str(tmp_path / "run"), str(tmp_path / "half"), base, "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5]},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_ends_that_are_tied_are_merged_each_by_itself(tmp_path, tokenizer, options):
    """What is added to one tensor must not change the other end, too."""
    torch.manual_seed(0)
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, **options))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
                assert "lora" in name or "token" in name or "modules_to_save" in name
    expected = logits(adapted, tokenizer)
    adapted.save_pretrained(tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(merge(str(tmp_path / "run"), base=str(tmp_path / "base")))
    torch.testing.assert_close(logits(merged, tokenizer), expected, rtol=1e-4, atol=1e-4)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer) - expected).abs().max() > 0.01


REVISED = """
import sys
from qtuning_trl.scripts import merge, sft
from qtuning_trl.studies import evaluation_model

sft.run(["--config", sys.argv[1], "--model_name_or_path", "me/model", "--model_revision", "earlier"])
print(merge.merge(sys.argv[2]))
name, _, revision = evaluation_model.find_model(None, sys.argv[2])
model = evaluation_model.load_model(name, "auto", "cpu", False, revision)
print(revision, model.config.hidden_size)
"""


def test_the_revision_of_the_base_is_that_which_was_trained(recipe, tokenizer, tmp_path):  # noqa: F811
    """Of two revisions in the cache of the Hub, of other sizes: what is merged and evaluated."""
    repository = tmp_path / "hub" / "models--me--model"
    for revision, (commit, size) in {"main": ("a" * 40, 32), "earlier": ("b" * 40, 64)}.items():
        tiny_llama(hidden_size=size).save_pretrained(repository / "snapshots" / commit)
        tokenizer.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REVISED, recipe(max_steps=1, save_strategy="no"), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "earlier 64"
    assert json.loads((tmp_path / "run" / "merged" / "config.json").read_text())["hidden_size"] == 64


def test_what_cannot_be_merged_is_refused(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "whole")
    assert "holds a whole model: there is nothing to merge" in refusal(
        capsys, cli.main, ["merge", str(tmp_path / "whole")]
    )
    assert "which holds no adapter: give the output_dir of a run" in refusal(capsys, cli.main, ["merge", str(tmp_path)])


def test_the_shell_completes_commands_and_options(capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for word in ("recipes", "merge", "--sample_ratio", "--learning_rate", "--adapter"):
        assert word in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert set(completion.make_parser()._actions[1].choices) == set(cli.COMMANDS)
