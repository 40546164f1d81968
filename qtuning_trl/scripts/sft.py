"""
Fine-tune a model with Q-Tuning: `trl sft` with our trainer, our options, and a mapping of the data set's columns.

```bash
qtuning sft --config recipes/smollm2-135m-lora.yaml --budget 25x70
accelerate launch -m qtuning_trl.scripts.sft --config recipes/smollm2-135m-lora.yaml --budget 25x70
```
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from qtuning_trl.interrupts import end_in_one_line

    end_in_one_line()

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from .. import demo
from ..cli import BAD_INPUT, EPILOG, FAILED_RUN, exit_on_error, take_traceback_flag
from ..config import QTuningSFTConfig
from ..data import holds_conversations, load_data, mapped, pick_split
from ..early import check_early
from ..errors import cause
from ..files import refuse_unusable_files
from ..host.checkpoints import checkpoint_to_resume, explained_if_full
from ..recipes import Parsed, RecipeParser
from ..values import refuse_missing_extras

if TYPE_CHECKING:
    from ..trainer import QTuningSFTTrainer

MODULE = "qtuning_trl.scripts.sft"


@dataclass
class QTuningScriptArguments(ScriptArguments):
    """TRL's [`~trl.ScriptArguments`], and how the data set's columns become those TRL takes."""

    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Text of the prompt, with the data set's columns in braces, e.g. `'{instruction}\\n{input}\\n'`. "
            "Lines and paragraphs whose columns are all empty are left out. Goes with `completion_template`."
        },
    )
    completion_template: str | None = field(
        default=None,
        metadata={"help": "Text of the completion, with the data set's columns in braces, e.g. `'{output}'`."},
    )
    messages_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of conversations, in ShareGPT's form (`from`, `value`) or OpenAI's (`role`, `content`), "
            "e.g. `'conversations'`. They need a chat template."
        },
    )
    as_messages: bool = field(
        default=False,
        metadata={
            "help": "Whether a prompt and its completion become the turns of a user and an assistant, written down by "
            "the chat template. Without templates, known columns are taken (`instruction`, `input`, `output`; "
            "`question`, `answer`; ...); `system`, `history` and `tools` go with them."
        },
    )
    fallback_chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template for a model that has none: a Jinja file, or a model that has one. A model that has "
            "its own keeps it, other than with `chat_template_path`."
        },
    )


@dataclass
class SFTScriptArguments(QTuningScriptArguments):
    """Those of the data, and whether to train at all."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Whether to stop before training, and print what would be trained on: rows, what is left out and "
            "cut, three samples with what is labelled marked, candidates and steps, the plan's memory and time, and "
            "what is unusual."
        },
    )


def make_parser(prog: str | None = None) -> RecipeParser:
    """The parser of the four groups of options. A recipe changes its defaults, so make one for each parse."""
    types = (SFTScriptArguments, QTuningSFTConfig, ModelConfig, DatasetMixtureConfig)
    return RecipeParser(types, prog=prog or "qtuning sft", description=__doc__.strip().split("\n")[0], epilog=EPILOG)


def parse(argv: Sequence[str], prog: str | None = None) -> Parsed:
    """
    Parse a command line and check whatever can be checked without loading anything.

    Raises:
        `ValueError`: In one sentence, for the first thing that is wrong.
    """
    parsed = make_parser(prog).parse(argv)
    refuse_missing_files(*parsed.dataclasses)
    return parsed


def refuse_missing_files(
    script_args: QTuningScriptArguments,
    training_args: QTuningSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Raise a `ValueError` if no model or no data is named, or what is named cannot be meant."""
    of_data = ("prompt_template", "completion_template", "messages_column", "fallback_chat_template")
    of_training = ("chat_template_path", "group_column")
    undone = [*((name, script_args) for name in of_data), *((name, training_args) for name in of_training)]
    for option, holder in undone:
        if str(getattr(holder, option)).lower() in ("null", "none"):
            setattr(holder, option, None)  # the command line's way to undo a recipe's
    names = ("dataset_name", "fallback_chat_template")
    values = {**vars(training_args), **vars(model_args), **{name: getattr(script_args, name) for name in names}}
    refuse_missing_extras(values)
    refuse_unusable_files({**values, "datasets": [vars(entry) for entry in dataset_args.datasets]})
    training_args.resume_from_checkpoint = checkpoint_to_resume(
        str(training_args.output_dir), training_args.resume_from_checkpoint
    )


def build_trainer(
    script_args: QTuningScriptArguments,
    training_args: QTuningSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    with_eval: bool = False,
) -> "QTuningSFTTrainer":
    """
    The trainer that the options describe, with its model and data loaded; `with_eval` loads the test split anyway.

    Raises:
        `ValueError`: If something that is named cannot be used.
    """
    from accelerate.logging import get_logger
    from transformers import set_seed
    from trl import get_peft_config, get_quantization_config

    from .. import QTuningSFTTrainer

    logger = get_logger(__name__)
    # Before the data is loaded: `test_split_size` draws from the global generator, and all processes, and a resumed
    # run, must draw the same split.
    set_seed(training_args.seed)
    model = find_model(model_args, training_args)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    if dataset_args.datasets and script_args.dataset_name:
        logger.warning(
            f"`dataset_name` is {script_args.dataset_name!r} and `datasets` is given too: as in TRL, `datasets` is "
            "used and `dataset_name` is ignored."
        )
    with training_args.main_process_first(desc="data set mapping"):
        splits = load_data(script_args, dataset_args)
        train_dataset = _mapped(splits, script_args.dataset_train_split, "train", script_args, training_args)
        eval_dataset = None
        if with_eval or training_args.eval_strategy != "no":
            eval_dataset = _mapped(splits, script_args.dataset_test_split, "test", script_args, training_args)
    settle_template(train_dataset, model, script_args, training_args)
    peft_config = get_peft_config(model_args)
    if peft_config is not None and model_args.model_revision != "main":
        peft_config.revision = model_args.model_revision  # so that who loads the adapter loads the same base
    trainer = QTuningSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
    )
    names = [str(part.path) for part in dataset_args.datasets or ()]
    trainer.dataset_name = ", ".join(names) or script_args.dataset_name
    return trainer


def model_init_kwargs(model_args: ModelConfig, training_args: QTuningSFTConfig) -> dict[str, Any]:
    """How to load the model: TRL's options for it, and over them those of `model_init_kwargs`."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **dict(training_args.model_init_kwargs or {}),  # type: ignore[arg-type]
    }


def find_model(model_args: ModelConfig, training_args: QTuningSFTConfig) -> str:
    """
    Name or path of the model to load.

    Raises:
        `ValueError`: If there is no model of that name, or it cannot be fetched.
    """
    from transformers import AutoConfig

    name = os.path.expanduser(str(model_args.model_name_or_path))
    if name == demo.BASE_MODEL:
        return demo.base_model_path()
    try:
        AutoConfig.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path` is {name!r}, which cannot be loaded ({cause(error)}): check the name and the "
            "connection (`hf auth login` for gated models), or give the folder of a local model."
        ) from error
    return name


def _mapped(
    splits: Any, name: str, kind: str, script_args: QTuningScriptArguments, training_args: QTuningSFTConfig
) -> Any:
    return mapped(pick_split(splits, name, f"dataset_{kind}_split"), script_args, training_args)


def settle_template(
    dataset: Any, model: str, script_args: QTuningScriptArguments, training_args: QTuningSFTConfig
) -> None:
    """Choose the chat template for mapped data: the model's own, if it has one."""
    from ..chat_templates import settle_chat_template
    from ..host.loading import load_processing_class

    if holds_conversations(dataset):
        tokenizer = load_processing_class(model, training_args)
        settle_chat_template(tokenizer, training_args, script_args.fallback_chat_template)


def train(trainer: "QTuningSFTTrainer", dataset_name: str | None = None) -> None:
    """Train, save, write the model card, and say where everything is; around the demo's data goes its report."""
    from ..data_check import one_line
    from ..dry_run import prepared_rows
    from ..records.run import SUMMARY_NAME
    from ..report.lines import closing_lines

    args = trainer.args
    output_dir = str(args.output_dir)
    report = None
    if dataset_name == demo.DATASET and trainer.is_world_process_zero():
        from ..demo.report import DemoReport

        report = DemoReport(trainer, demo.load_demo_dataset()["test"])
    trainer.accelerator.print(one_line(trainer.data_check, args, prepared_rows(trainer)))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    with explained_if_full(Path(output_dir)):
        trainer.save_model(output_dir)
    trainer.create_model_card(dataset_name=dataset_name)
    if report is not None:
        report.finish(output_dir)
    adapter = bool(getattr(trainer.model, "peft_config", None))
    trainer.accelerator.print(closing_lines(trainer.summary(), output_dir, adapter, args.record, SUMMARY_NAME))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Pushed to https://huggingface.co/{trainer.hub_model_id}")
    trainer.end()


def main(
    script_args: QTuningScriptArguments,
    training_args: QTuningSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> "QTuningSFTTrainer":
    """
    Fine-tune a model; the same four groups of options as `trl.scripts.sft.main`.

    Returns:
        [`QTuningSFTTrainer`]: The trainer, after training.
    """
    trainer = build_trainer(script_args, training_args, model_args, dataset_args)
    finish(trainer, script_args)
    return trainer


def finish(trainer: "QTuningSFTTrainer", script_args: QTuningScriptArguments) -> None:
    """Train, or with `dry_run` say what would be trained on."""
    if getattr(script_args, "dry_run", False):
        from ..dry_run import describe

        if trainer.is_world_process_zero():
            print(describe(trainer))
        trainer.end()
    else:
        train(trainer, script_args.dataset_name)


def run(argv: Sequence[str]) -> None:
    """What each launched process does; ends it with one line if something goes wrong."""
    with exit_on_error(BAD_INPUT):
        check_early(argv := take_traceback_flag(argv), "sft")
        parsed = parse(argv)
        if parsed.typed_launch_args:
            raise ValueError(
                f"`{parsed.typed_launch_args[0]}` is an option of `accelerate launch`: give it before `-m {MODULE}`, "
                "or use `qtuning sft`, which takes both."
            )
        trainer = build_trainer(*parsed.dataclasses)
    with exit_on_error(FAILED_RUN):
        finish(trainer, parsed.dataclasses[0])


if __name__ == "__main__":
    run(sys.argv[1:])
