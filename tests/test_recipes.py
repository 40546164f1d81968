"""Every recipe parses, and starts on a tiny stand-in of the same architecture; recipes build on each other."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import WORDS
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedTokenizerFast

from qtuning_trl.data import Template
from qtuning_trl.method import budget_size
from qtuning_trl.recipe_files import load_recipe
from qtuning_trl.scripts.sft import main, parse

RECIPES = Path(__file__).parents[1] / "recipes"
ON_CPU = RECIPES / "smollm2-135m-cpu.yaml"
OTHERS = ("base", "qlora", "importance", "demo", ON_CPU.stem)
MODELS = sorted(path for path in RECIPES.glob("*.yaml") if path.stem not in OTHERS)
PAPER = sorted(path for path in (RECIPES / "paper").glob("*.yaml") if path.stem not in ("base", "table2"))
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ARCHITECTURES = {
    "smollm2": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "llama-3.2": {"tie_word_embeddings": True, "num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE},
    "llama-3.1": {"tie_word_embeddings": False, "num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE},
    "llama-2": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama-3-8b": {"tie_word_embeddings": False, "num_key_value_heads": 2},
    "mistral": {"tie_word_embeddings": False, "num_key_value_heads": 2},
}
ROWS = {
    "mathinstruct": {"source": "s", "instruction": "add 1 and 2", "output": "the sum is 3"},
    "wizardlm": {"instruction": "add 1 and 2", "output": "the sum is 3"},
    "local": {"prompt": "1 + 2", "completion": "the sum is 3"},
    "local_instruction": {"instruction": "add", "input": "", "output": "the sum is 3"},
    "local_instruction_messages": {
        "instruction": "add",
        "input": "1 2",
        "output": "the sum is 3",
        "history": [["a", "b"]],
    },
    "local_question_answer": {"question": "1 + 2", "answer": "the sum is 3"},
    "openhermes": {
        "conversations": [{"from": "human", "value": "add 1 and 2"}, {"from": "gpt", "value": "the sum is 3"}],
        "source": None,
    },
    "local_conversations": {
        "conversations": [{"role": "user", "content": "add 1"}, {"role": "assistant", "content": "the sum is 3"}]
    },
}
CPU = ["--use_cpu", "--bf16", "false"]


@pytest.fixture(scope="module")
def standins(tmp_path_factory, tokenizer_dir) -> dict[str, str]:
    """A tiny model of each architecture, saved with a tokenizer that has no chat template, as the base models'."""
    paths = {}
    for name, options in ARCHITECTURES.items():
        torch.manual_seed(0)
        model_class = MistralForCausalLM if name == "mistral" else LlamaForCausalLM
        config = model_class.config_class(
            vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
        )  # fmt: skip
        path = tmp_path_factory.mktemp("standins") / name
        model_class(config).save_pretrained(path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(path)
        paths[name] = str(path)
    return paths


def test_there_is_a_recipe_for_each_model_and_it_names_its_card():
    names = {path.stem for path in MODELS}
    both = {"smollm2-1.7b", "llama-3.2-1b", "llama-3.2-3b", "llama-2-7b", "llama-3.1-8b"}
    assert names == {"smollm2-135m-lora", "smollm2-360m-lora"} | {f"{m}-{k}" for m in both for k in ("lora", "qlora")}
    for path in MODELS:
        assert re.search(r"Meant for a card with \d+ GB, e\.g\. an RTX", path.read_text().splitlines()[0])


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_recipe_parses_to_the_papers_settings(path):
    parsed = parse(["--config", str(path), *CPU])
    script_args, args, model_args, _ = parsed.dataclasses
    assert parsed.launch_args == []
    assert (args.sample_ratio, args.token_ratio, args.neighbor_weight) == (0.125, 0.5, 0.5)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    assert (args.num_train_epochs, args.learning_rate, args.lr_scheduler_type) == (3, 1e-4, "cosine")
    assert (args.max_length, model_args.lora_r, model_args.use_peft) == (2048, 8, True)
    assert (model_args.dtype, model_args.lora_target_modules) == ("bfloat16", "all-linear")
    assert model_args.load_in_4bit == model_args.use_bnb_nested_quant == path.stem.endswith("qlora")
    assert script_args.dataset_name == "TIGER-Lab/MathInstruct"
    assert args.output_dir == f"outputs/{path.stem}"


@pytest.mark.parametrize("budget", ["12.5x50", "12.5x70", "25x50", "25x70", "50x70"])
def test_the_papers_budgets_are_one_key(budget):
    _, args, _, _ = parse(["--config", str(MODELS[0]), "--budget", budget, *CPU]).dataclasses
    samples, tokens = budget.split("x")
    assert (args.sample_ratio, args.token_ratio) == (float(samples) / 100, float(tokens) / 100)


def start(recipe: Path, data: str, standins: dict[str, str], folder: Path, bases: tuple[Path, ...], **changes) -> dict:
    """One optimizer step of a recipe on a stand-in, by a user's file that builds on it; the run's summary."""
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(ROWS[data]) for _ in range(8)))
    changes = {
        "base": [str(recipe), *map(str, bases)],
        "model_name_or_path": next(path for name, path in standins.items() if recipe.stem.startswith(name)),
        "dataset_name": str(rows),
        "use_cpu": True,
        "max_steps": 1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "output_dir": str(folder / "run"),
        "save_strategy": False,  # YAML's bare `no`
        **changes,
    }
    own = folder / "own.yaml"
    own.write_text(yaml.safe_dump(changes))
    trainer = main(*parse(["--config", str(own)]).dataclasses)
    in_four_bits = any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
    assert in_four_bits == recipe.stem.endswith("qlora")
    assert (folder / "run" / "adapter_model.safetensors").is_file()
    return json.loads((folder / "run" / "qtuning_summary.json").read_text())


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_recipe_starts_on_a_stand_in(path, standins, tmp_path):
    summary = start(path, "mathinstruct", standins, tmp_path, ())
    assert (summary["steps"], summary["candidates"], summary["kept"]) == (1, 8, 1)


def test_the_recipe_for_a_cpu_starts_and_measures_before_and_after(standins, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(ROWS["local_question_answer"]) for _ in range(33)))
    arguments = ["--model_name_or_path", standins["smollm2"], "--dataset_name", str(rows), "--max_steps", "1"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--eval_steps", "1"]
    trainer = main(*parse(["--config", str(ON_CPU), *arguments]).dataclasses)
    summary = json.loads((tmp_path / "run" / "qtuning_summary.json").read_text())
    assert (summary["steps"], summary["candidates"], summary["kept"]) == (1, 32, 8)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 1]


def test_the_recipe_for_a_cpu_measures_at_its_end():
    recipe = load_recipe(ON_CPU)
    assert recipe["eval_on_start"] is True
    assert recipe["max_steps"] % recipe["eval_steps"] == 0


@pytest.mark.parametrize("data", sorted(ROWS))
def test_every_kind_of_data_starts(data, standins, tmp_path):
    bases = (RECIPES / "data" / f"{data}.yaml",)
    summary = start(RECIPES / "smollm2-135m-lora.yaml", data, standins, tmp_path, bases)
    assert (summary["steps"], summary["candidates"], summary["kept"]) == (1, 8, 1)


def test_tokens_drawn_by_importance_are_one_more_base(standins, tmp_path):
    summary = start(
        RECIPES / "llama-3.2-1b-qlora.yaml", "mathinstruct", standins, tmp_path, (RECIPES / "importance.yaml",)
    )
    assert (summary["steps"], summary["candidates"], summary["kept"]) == (1, 8, 4)
    tokens = summary["answer_tokens"]
    assert tokens["kept"] == budget_size(0.125, tokens["candidates"])
    assert summary["seconds"]["scoring"] == 0.0


PAPER_PROMPTS = {
    "smollm2-1.7b-mathinstruct": "Human: add 1 and 2<|endoftext|>\nAssistant:|the sum is 3",
    "llama-3-8b-mathinstruct": "Human: add 1 and 2<|end_of_text|>\nAssistant:|the sum is 3",
    "mistral-7b-mathinstruct": "[INST] add 1 and 2[/INST]| the sum is 3",
    "mistral-7b-wizardlm": "[INST] add 1 and 2[/INST]| the sum is 3",
    "llama-2-7b-wizardlm": "[INST] add 1 and 2 [/INST]| the sum is 3",
}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_recipes_are_the_authors_settings(path):
    script_args, args, model_args, _ = parse(["--config", str(path), *CPU]).dataclasses
    assert (args.sample_pruner, args.token_pruner) == ("q_tuning_code", "q_tuning_code")
    assert (args.sample_ratio, args.token_ratio, args.neighbor_weight) == (0.25, 0.5, 0.5)
    assert (args.selection_scope, args.per_device_train_batch_size, args.token_pruning) == ("micro_batch", 8, "mask")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
    assert (args.num_train_epochs, args.learning_rate, args.lr_scheduler_type) == (3, 1e-4, "cosine")
    assert args.get_warmup_steps(1000) == 100
    assert (args.max_length, model_args.lora_r, model_args.lora_alpha) == (2048, 8, 16)
    assert (model_args.lora_target_modules, model_args.dtype) == ("all-linear", "bfloat16")
    assert args.output_dir == f"outputs/paper/{path.stem}"
    data = path.stem.rsplit("-", 1)[1]
    keys = load_recipe(RECIPES / "data" / f"{data}.yaml")
    assert script_args.dataset_name == keys["dataset_name"]
    assert args.group_column == keys["group_column"]
    prompt, completion = (
        Template(text).render(ROWS[data]) for text in (script_args.prompt_template, script_args.completion_template)
    )
    assert f"{prompt}|{completion}" == PAPER_PROMPTS[path.stem]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_recipes_start_on_a_stand_in(path, standins, tmp_path):
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    summary = start(path, path.stem.rsplit("-", 1)[1], standins, tmp_path, (), **batch)
    assert (summary["steps"], summary["candidates"]) == (1, 8)
    assert summary["kept"] >= 2  # the authors' rule may keep more than a quarter


def test_any_data_file_replaces_any_other():
    keys = {name: load_recipe(RECIPES / "data" / f"{name}.yaml").keys() for name in ROWS}
    assert all(these == keys["mathinstruct"] for these in keys.values())


def test_the_chat_template_teaches_to_stop(tokenizer):
    tokenizer.chat_template = (RECIPES / "chat_template.jinja").read_text()
    messages = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "q"), ("assistant", "a"))]
    text = "<s>s\n\n### Instruction:\nq\n\n### Response:\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text + "a</s>"
    assert tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True) == text
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.convert_ids_to_tokens(trained) == ["a", "</s>"]


def test_a_recipe_builds_on_others_and_the_later_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("x: 1\ny: 1\nz: 1\nenv: {A: 1, B: 1}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ny: 2\nenv: {B: 2}\n")
    (tmp_path / "c.yaml").write_text("base: [a.yaml, b.yaml]\nz: 3\n")
    assert load_recipe(tmp_path / "c.yaml") == {"x": 1, "y": 2, "z": 3, "env": {"A": 1, "B": 2}}


def test_several_recipes_on_the_command_line_are_one_and_the_later_wins(tmp_path, monkeypatch):
    """As `base` does it; a launched process is told all of them."""
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").touch()
    argv = ["--config", "smollm2-1.7b-lora", "--config=importance", "--seed", "7", "--config", "data/local"]
    parsed = parse([*argv, *CPU])
    script_args, args, model_args, _ = parsed.dataclasses
    assert (args.budget, args.token_pruner, args.seed) == ("50x25", "importance", 7)
    assert model_args.model_name_or_path == "HuggingFaceTB/SmolLM2-1.7B"
    assert (script_args.dataset_name, script_args.prompt_template, args.group_column) == ("train.jsonl", None, None)
    configs = ["--config", "smollm2-1.7b-lora", "--config", "importance", "--config", "data/local"]
    assert parsed.script_args == [*configs, "--seed", "7", *CPU]
    Path("own.yaml").write_text("budgets: 25x50\n")
    with pytest.raises(ValueError, match=r"`budgets: 25x50` in own.yaml is no known option: did you mean `budget`"):
        parse(["--config", "own.yaml", "--config", "importance"])


def test_paths_beside_a_recipe_are_found(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").touch()
    (tmp_path / "chat.jinja").touch()
    text = "datasets: [{path: json, data_files: [rows.json, other.json]}]\nchat_template_path: ../chat.jinja\n"
    (tmp_path / "data" / "own.yaml").write_text(text)
    (tmp_path / "top.yaml").write_text("base: data/own.yaml\n")
    recipe = load_recipe(tmp_path / "top.yaml")
    assert recipe["datasets"][0]["data_files"] == [str(tmp_path / "data" / "rows.json"), "other.json"]
    assert Path(recipe["chat_template_path"]).samefile(tmp_path / "chat.jinja")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: own.yaml\n", "leads back to the recipe itself"),
        ("base: other.yaml\n", r"`base` in .*own.yaml is '.*other.yaml': give the path of a recipe"),
        ("base: {a: 1}\n", "give the path of a recipe, or a list of paths"),
        ("- a\n- b\n", "give a YAML file of lines `key: value`"),
        ("a: [1\n", "this is no YAML file"),
        ("env: 3\n", "`env` in .* is 3"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "own.yaml")
