"""
Names of options: those there are, read from the sources without importing anything, and the one that was meant.

Importing torch, transformers and TRL takes many seconds; a misspelt option should be told at once.
"""

import ast
import difflib
import re
from importlib.util import find_spec
from pathlib import Path

# Where the options of `qtuning sft` and `qtuning score` are declared, and those of `accelerate launch`.
DATACLASSES = (
    ("transformers", "training_args.py"),
    ("trl", "trainer/base_config.py"),
    ("trl", "trainer/sft_config.py"),
    ("trl", "trainer/model_config.py"),
    ("trl", "scripts/utils.py"),
    ("qtuning_trl", "config.py"),
)
LAUNCHER = ("accelerate", "commands/launch.py")
OPTION = re.compile("--[a-z0-9_-]+")
OTHERS = ("accelerate_config", "base", "config", "env")

# What others call an option of ours, with a word on its values where they differ.
MEANT = {
    # older TRL and transformers
    "torch_dtype": "dtype",
    "dataset_mixture": "datasets",
    "dataset_mixer": "datasets",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "model_name": "model_name_or_path",
    "model": "model_name_or_path",
    "warmup_ratio": "warmup_steps, which below 1 is a share of the steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "use_lora": "use_peft",
    "response_template": "assistant_only_loss",
    # short ones
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "output": "output_dir",
    # LLaMA-Factory
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "finetuning_type": "use_peft, true for LoRA and false for full fine-tuning",
    "cutoff_len": "max_length",
    "dataset": "dataset_name",
    "dataset_dir": "dataset_name, which takes a local file",
    "template": "chat_template_path",
    "val_size": "test_split_size",
    "quantization_bit": "load_in_4bit, true or false",
    "quantization_type": "bnb_4bit_quant_type",
    "double_quantization": "use_bnb_nested_quant",
    "flash_attn": "attn_implementation",
    "preprocessing_num_workers": "dataset_num_proc",
    "train_on_prompt": "completion_only_loss, which is the opposite",
    "mask_history": "assistant_only_loss",
    "neat_packing": "packing",
    "additional_target": "lora_modules_to_save",
    "use_swanlab": "report_to",
    # Axolotl
    "base_model": "model_name_or_path",
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "val_set_size": "test_split_size",
    "sample_packing": "packing",
    "adapter": "use_peft, true for LoRA",
    "lora_target_linear": "lora_target_modules, 'all-linear'",
    "flash_attention": "attn_implementation",
    "sdp_attention": "attn_implementation",
    "train_on_inputs": "completion_only_loss, which is the opposite",
    "chat_template": "chat_template_path",
    "chat_template_jinja": "chat_template_path",
    "dataset_processes": "dataset_num_proc",
    "saves_per_epoch": "save_steps, which below 1 is a share of the steps",
    "evals_per_epoch": "eval_steps, which below 1 is a share of the steps",
    "wandb_project": "report_to, with WANDB_PROJECT in `env`",
    "use_wandb": "report_to",
}
NOT_NEEDED = {"stage", "overwrite_output_dir", "overwrite_cache", "plot_loss", "save_safetensors", "rl", "model_type"}
# Spellings less alike than this are other words: `lora_rank` is not `local_rank` (0.84).
LIKENESS = 0.87


def known_names(script: str) -> set[str] | None:
    """
    Names of all options of `qtuning sft` or `qtuning score`, read from the sources that declare them.

    Args:
        script (`str`): `'sft'` or `'score'`.

    Returns:
        `set[str]` or `None`: `None` if a library is built in another way than was expected, so that names would be
        missing; the parser itself knows them then.
    """
    names, classes, bases = set(OTHERS), set(), set()
    own = [("qtuning_trl", f"scripts/{name}.py") for name in dict.fromkeys(("sft", script))]
    for package, file in (*DATACLASSES, *own, LAUNCHER):
        tree = _source(package, file)
        if tree is None:
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and OPTION.fullmatch(str(node.value)):
                names.add(str(node.value).lstrip("-").replace("-", "_"))
            elif isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                classes.add(node.name)
                bases |= {ast.unparse(base) for base in node.bases}
                targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    # A dataclass that inherits from one which is not in these files has options that were not read.
    return names if bases <= classes else None


def _source(package: str, file: str) -> ast.Module | None:
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, file)
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def remedy(name: str, known: set[str], prog: str, dashes: str = "") -> str:
    """
    What to do about an option that is not known: the end of a sentence.

    A name of another tool is translated; else the nearest name is meant, if it is near: none beats a wrong one.
    """
    if name in NOT_NEEDED:
        return "leave it out, nothing here needs it."
    option, _, note = MEANT.get(name, "").partition(", ")
    if not option:
        option = next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=LIKENESS)), "")
    if option:
        return f"did you mean `{dashes}{option}`{f', {note}' if note else ''}?"
    return f"`{prog} --help-all` lists those there are."
