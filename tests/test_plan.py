"""`qtuning plan`: counts on fake tensors are those of real ones; settings that fit; bad input."""

import json
import os
import pickle
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import trl.trainer.utils as trl_head
import yaml
from conftest import tiny_llama
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    T5Config,
    masking_utils,
)
from trl import get_peft_config

from qtuning_trl.config import QTuningSFTConfig
from qtuning_trl.host.head import lean_lm_head
from qtuning_trl.host.ledger import Ledger
from qtuning_trl.host.loop import without_checkpointing
from qtuning_trl.plan import counting, plan
from qtuning_trl.plan.beside import Facts, plan_line
from qtuning_trl.plan.counting import Batch, CountedModel, FakeRun
from qtuning_trl.plan.fit import fit, recipe_lines, write_recipe
from qtuning_trl.plan.lengths import Lengths, prepared_lengths
from qtuning_trl.plan.model import model_config
from qtuning_trl.plan.plan import GIB, verdict
from qtuning_trl.plan.recipes import END, START, named_card, update_readme
from qtuning_trl.plan.text import TABLE_CARDS, describe, one_line
from qtuning_trl.plan.timing import Budget, Cost, Costs, StepShape, step_time
from qtuning_trl.plan.trainer import stand_in_trainer
from qtuning_trl.recipe_files import recipe_paths
from qtuning_trl.scripts import sft
from qtuning_trl.scripts.plan import make_planner, parse, recipe_planner
from qtuning_trl.scripts.sft import make_parser

RECIPES = Path(__file__).parents[1] / "recipes"
SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
OPTIONS = ["--dtype", "bfloat16", "--bf16", "true", "--use_peft", "true", "--lora_target_modules", "all-linear"]


@pytest.fixture(scope="module")
def shape_dir(tmp_path_factory) -> str:
    """A folder that holds the config.json of a model of six layers, and nothing else."""
    path = tmp_path_factory.mktemp("shape")
    LlamaConfig(num_hidden_layers=6, **SHAPE).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory) -> str:
    """The same with two layers, which are counted as they are: half the time."""
    path = tmp_path_factory.mktemp("small")
    LlamaConfig(num_hidden_layers=2, **SHAPE).save_pretrained(path)
    return str(path)


def arguments(model: str, *options: str) -> tuple:
    argv = ["--model_name_or_path", model, "--dataset_name", "x", "--use_cpu", "true", *OPTIONS, *options]
    return make_parser().parse(argv).dataclasses


def counted(model: str, *options: str, whole: bool = False) -> CountedModel:
    _, training_args, model_args, _ = arguments(model, *options)
    return CountedModel(model_config(model_args, training_args), model_args, training_args, whole)


# The ledger


def test_a_ledger_counts_what_is_alive_and_the_most_that_was():
    with Ledger() as ledger:
        a = torch.zeros(256)  # 1,024 bytes
        b = a.view(16, 16)  # the same storage
        c = a + 1
        del c
        d = torch.zeros(3)  # a block of 512
        assert ledger.bytes == 1024 + 512
        product = b @ b
        assert ledger.flops == {"layers": 2 * 16**3}
        assert ledger.peak.bytes == 1024 + 512 + 1024
        del a
        assert ledger.bytes == 1024 + 512 + 1024  # `b` holds the storage
        del b, d, product
        assert ledger.bytes == 0
        assert ledger.peak.bytes == 2560


@contextmanager
def as_on_this_cpu(ledger):
    with lean_lm_head(torch.device("cpu")), patch.object(masking_utils, "is_tracing", lambda _tensor=None: False):
        yield


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "free"])
def test_fake_tensors_take_what_real_ones_take(tmp_path, monkeypatch, checkpointing):
    # On the path of a CPU, so that real tensors can go it too.
    monkeypatch.setattr(counting, "as_on_cuda", as_on_this_cpu)
    model = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **SHAPE)).to(torch.bfloat16).save_pretrained(model)
    _, training_args, model_args, _ = arguments(
        str(model), "--output_dir", str(tmp_path), "--report_to", "none", "--max_length", "128"
    )
    batch = Batch(rows=1, length=128, labelled=0.5)
    fake = FakeRun(model_config(model_args, training_args), model_args, training_args).train(batch, checkpointing)

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16"), get_peft_config(model_args))
    trainer = stand_in_trainer(model, training_args)
    trainer.model.gradient_checkpointing_enable()
    trainer.model.enable_input_require_grads()
    wrapped = trainer.accelerator.prepare_model(trainer.model, device_placement=False)
    trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    trainer.optimizer.step()
    ids = np.arange(128) % 500
    labels = np.where(np.arange(128) > 64, ids, -100)
    real = Ledger()
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    for tensor in [*model.parameters(), *model.buffers(), *states, *(p.grad for p in model.parameters())]:
        if tensor is not None:
            real.track(tensor)
    with real, as_on_this_cpu(real), nullcontext() if checkpointing else without_checkpointing(model):
        trainer.training_step(wrapped, trainer.data_collator([{"input_ids": ids, "labels": labels}]), 100)
    assert real.peak.bytes == pytest.approx(fake.peak.bytes, rel=2e-3)
    assert (
        real.flops["layers"] + real.flops["attention"]
        == fake.flops["layers"] + fake.flops["attention"] + fake.flops["head"]
    )


# Counts


def test_two_and_three_layers_tell_of_the_whole_model(shape_dir):
    few, whole = counted(shape_dir), counted(shape_dir, whole=True)
    assert [run.model.config.num_hidden_layers for run in few.runs] == [2, 3]
    assert whole.runs[0].model.config.num_hidden_layers == 6
    batch = Batch(rows=2, length=256, labelled=0.5)
    for name, one, other in (
        ("checkpointed", few.train(batch, True), whole.train(batch, True)),
        ("free", few.train(batch, False), whole.train(batch, False)),
        ("scoring", few.score(batch), whole.score(batch)),
        ("optimizer", few.optimizer_step(), whole.optimizer_step()),
    ):
        assert one.flops == other.flops, name
        assert one.peak.bytes == pytest.approx(other.peak.bytes, rel=1e-3), name


def test_weights_and_operations_worked_by_hand(shape_dir):
    model = counted(shape_dir, "--lora_r", "8")
    hidden, inner, vocabulary, heads = 128, 384, 512, (128, 64)
    linears = [(hidden, heads[0]), (hidden, heads[1]), (hidden, heads[1]), (heads[0], hidden)]
    linears += [(hidden, inner), (hidden, inner), (inner, hidden)]
    frozen = 6 * (sum(a * b for a, b in linears) + 2 * hidden) + 2 * vocabulary * hidden + hidden
    adapters = 6 * sum(8 * (a + b) for a, b in linears)
    parts = model.optimizer_step().peak.by_part
    assert parts["adapters"] == parts["gradients"] == 4 * adapters  # PEFT keeps them in float32
    blocks = 512 * 6 * 7 * 2 + 2 * 512 * 2 * 6  # tensors are rounded up to blocks of 512 bytes
    assert 2 * frozen <= parts["weights"] <= 2 * frozen + blocks
    assert 8 * adapters <= parts["optimizer"] <= 8 * adapters + blocks

    batch = Batch(rows=2, length=100, labelled=0.5)
    flops = model.score(batch).flops
    assert flops["layers"] == 2 * 200 * (6 * sum(a * b for a, b in linears) + adapters)
    assert flops["head"] == 2 * 99 * hidden * vocabulary


def test_four_bit_weights_take_half_a_byte_and_their_scales(shape_dir):
    options = ("--load_in_4bit", "true", "--use_bnb_nested_quant", "true")
    parts = counted(shape_dir, *options).optimizer_step().peak.by_part
    linear = 6 * (128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 384)
    other = 2 * (2 * 512 * 128 + 13 * 128)
    scales = linear / 64 + 4 * linear / 64 / 256
    blocks = 6 * 7 * 6 * 512  # tensors of a quantized weight are rounded up to blocks of 512 bytes
    assert linear / 2 + scales + other <= parts["weights"] <= linear / 2 + scales + other + blocks
    assert parts["adapters"] == parts["gradients"]


def test_counting_leaves_nothing_behind(shape_dir):
    attention = torch.nn.functional.scaled_dot_product_attention
    own = [vars(trl_head)[name] for name in ("_use_triton", "_ChunkedLogProbFunction")]
    counted(shape_dir).train(Batch(1, 32, 0.5), True)
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert [vars(trl_head)[name] for name in ("_use_triton", "_ChunkedLogProbFunction")] == own
    model = tiny_llama()
    assert model(torch.ones((1, 4), dtype=torch.int64)).logits.isfinite().all()


# Time


def test_time_worked_by_hand():
    # Four rows of ten tokens, none labelled: plain is 3 a token; scoring 1; of one survivor 2 without checkpointing.
    lengths = Lengths(np.full(8, 10), np.zeros(8, dtype=int), 10, 8, "")
    costs = Costs(Cost(1, 0, 0), Cost(3, 0, 0), Cost(2, 0, 0))
    plain = {"plain_rows": 2, "plain_checkpointing": True}
    shape = StepShape(rows=2, slots=2, checkpointing=True, free_tokens=0, scoring_tokens=40, **plain)
    budget = Budget(sample_ratio=0.25, token_ratio=0.5, drop=False)
    assert step_time(lengths, shape, budget, costs) == pytest.approx(
        {"scoring": 1 / 3, "training": 1 / 4, "step": 7 / 12}
    )
    free = step_time(lengths, replace(shape, free_tokens=10), budget, costs)
    assert free["training"] == pytest.approx(1 / 6)
    assert step_time(lengths, shape, Budget(1.0, 1.0, False), costs)["step"] == pytest.approx(1)
    assert step_time(lengths, shape, replace(budget, scored_share=0.5), costs)["scoring"] == pytest.approx(1 / 6)
    # Where samples are chosen without scores, only the survivor is scored for its tokens, or nothing is.
    unscored = replace(budget, scored_share=0.0)
    assert step_time(lengths, shape, unscored, costs) == pytest.approx({"scoring": 0, "training": 1 / 4, "step": 1 / 4})
    assert step_time(lengths, shape, replace(unscored, survivors_scored=True), costs)["scoring"] == pytest.approx(
        1 / 12
    )


def test_verdicts_leave_room_for_the_context_and_fragmentation():
    assert verdict(10.3 * GIB, 12) == "fits"
    assert verdict(10.6 * GIB, 12) == "tight"
    assert verdict(11.5 * GIB, 12) == "does not fit"


# The command


def test_the_command_writes_a_plan_in_a_process_of_its_own(tmp_path, shape_dir):
    rows = [{"prompt": "a" * (4 + i % 5), "completion": "b" * 8} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--model_name_or_path", shape_dir, "--dataset_name", str(tmp_path / "rows.jsonl"), *OPTIONS]
    options += ["--max_length", "64", "--budget", "25x50", "--per_device_train_batch_size", "4"]
    command = [sys.executable, "-m", "qtuning_trl", "plan", *options, "--card", "6", "--json", str(tmp_path / "p.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["verdict"] == {"6": "fits"}
    assert "Card with 6 GB: fits" in done.stdout
    assert plan["lengths"]["source"] == "the tokenizer is not here: rows of `max_length` assumed"
    assert plan["memory"]["peak"] == max(plan["memory"]["peaks"][name] for name in ("optimizer", "scoring", "training"))
    assert plan["memory"]["peak"] == sum(plan["memory"]["parts"].values())
    assert plan["memory"]["peaks"]["scoring"] <= plan["memory"]["peaks"]["training"]
    assert plan["time"]["step"] == pytest.approx(plan["time"]["scoring"] + plan["time"]["training"])
    assert plan["run"] == {"candidates": 4, "survivors": 1, "steps": None, "tokens": None}
    assert done.stderr == ""


def test_rows_are_measured_as_trl_prepares_them(tmp_path, model_dir):
    rows = [{"prompt": "a" * (4 + i % 5), "completion": "b" * 8} for i in range(40)] + [
        {"prompt": "a" * 30, "completion": "b"}
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--dataset_name", str(tmp_path / "rows.jsonl")]
    planner = make_planner(["--model_name_or_path", model_dir, *data, *OPTIONS, "--num_train_epochs", "2"])
    lengths = planner.lengths
    assert (lengths.rows, lengths.longest, len(lengths.tokens)) == (41, 32, 41)  # 30 + 1 + the end of the sequence
    assert sorted(set(lengths.tokens)) == [13, 14, 15, 16, 17, 32]
    assert sorted(set(lengths.labelled)) == [2, 9]
    assert planner.plan().run["steps"] == 12  # 41 rows, eight at a time, twice


@pytest.fixture
def only_the_model(monkeypatch):
    """Cards as small as the tests' models: no CUDA context."""
    monkeypatch.setattr(plan, "CUDA_CONTEXT", 0.0)


@cache  # counting takes the time, and a planner counts nothing twice
def planner_of(model: str, *options: str):
    rows = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4", "--max_length", "256"]
    return make_planner(["--model_name_or_path", model, "--budget", "12.5x50", *rows, *OPTIONS, *options])


@pytest.mark.parametrize(("scope", "survivors"), [("process", 8), ("all_processes", 8), ("micro_batch", 16)])
@pytest.mark.parametrize("option", ["--num_processes", "--num-processes"])
def test_survivors_are_counted_by_what_is_compared(small_dir, option, scope, survivors):
    """12.5% of 16 candidates on each of 4 processes, of all 64, or of the 4 in each of 16 micro-batches."""
    planner = planner_of(small_dir, option, "4", "--gradient_accumulation_steps", "4", "--selection_scope", scope)
    run = planner._run(planner.setting)
    assert (run["candidates"], run["survivors"]) == (64, survivors)


@pytest.mark.parametrize("room", [0.5, 8.0])
def test_fit_finds_the_fastest_settings_that_fit_and_learn_the_same(only_the_model, small_dir, room):
    planner = planner_of(small_dir)
    own = planner.plan()
    one_row = planner.memory(replace(planner.setting, rows=1, accumulation=16)).bytes
    card = (one_row + room * (own.memory.bytes - one_row)) * 1.1 / GIB
    found = fit(planner, card)
    assert found.memory.bytes * 1.1 <= card * GIB
    assert found.setting.rows * found.setting.accumulation == 16
    assert not found.setting.four_bit
    assert found.time["step"] <= own.time["step"]
    assert found.memory.peaks["scoring"] <= found.memory.peaks["training"]
    if room == 0.5:
        assert found.setting.rows < 4
    if room == 8.0:
        assert found.setting.survivors == "auto"
        assert found.time["step"] < own.time["step"]


def test_fit_leaves_a_micro_batch_as_large_where_it_is_the_pool(only_the_model, small_dir):
    planner = planner_of(small_dir, "--selection_scope", "micro_batch")
    own, smaller = planner.setting, replace(planner.setting, rows=1, accumulation=16)
    found = fit(planner, 8.0)
    assert (found.setting.rows, found.setting.accumulation) == (own.rows, own.accumulation) == (4, 4)
    with pytest.raises(ValueError, match="4 rows of 256 tokens at a time, does not fit"):
        fit(planner, 1.1 * planner.memory(replace(smaller, four_bit=True)).bytes / GIB)


def test_fit_takes_four_bits_only_if_it_must_and_never_another_max_length(only_the_model, small_dir):
    planner = planner_of(small_dir)
    weights = planner.plan().memory.parts["weights"]
    smallest = replace(planner.setting, rows=1, accumulation=16)
    in_four_bits = planner.memory(replace(smallest, four_bit=True)).bytes
    assert in_four_bits < planner.memory(smallest).bytes
    assert fit(planner, 1.11 * in_four_bits / GIB).setting.four_bit
    with pytest.raises(
        ValueError, match=r"one row of 256 tokens at a time, does not fit: with `max_length` \d+ it would"
    ):
        fit(planner, 1.1 * (in_four_bits - 100_000) / GIB)
    with pytest.raises(ValueError, match="choose a smaller model"):
        fit(planner, 0.1 * weights / GIB)


def test_fit_of_a_run_that_keeps_everything_leaves_checkpointing_out_where_it_can(only_the_model, small_dir):
    planner = planner_of(small_dir, "--budget", "100x100")
    assert planner.plan().time == {"scoring": 0.0, "training": 1.0, "step": 1.0}
    assert not fit(planner, 4.0).setting.checkpointing
    one_row = replace(planner.setting, rows=1, accumulation=16)
    free = planner.memory(replace(one_row, checkpointing=False)).bytes
    assert planner.memory(one_row).bytes < free
    assert fit(planner, 1.1 * (free - 512) / GIB).setting.checkpointing


def test_a_written_recipe_builds_on_the_other_and_has_the_same_plan(only_the_model, tmp_path, small_dir):
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_length": 256}
    recipe = {"model_name_or_path": small_dir, "budget": "12.5x50", "bf16": True, "dtype": "bfloat16", **rows}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "use_peft": True}))
    planner = make_planner(["--config", str(tmp_path / "recipe.yaml")])
    found = fit(planner, 0.012)
    lines = recipe_lines(found, planner.setting)
    write_recipe(tmp_path / "new.yaml", [str(tmp_path / "recipe.yaml"), "importance"], lines, 0.012)
    assert yaml.safe_load((tmp_path / "new.yaml").read_text()) == {"base": ["recipe.yaml", "importance"], **lines}
    again = make_planner(["--config", str(tmp_path / "new.yaml")]).plan()
    del found.memory.peaks["plain"], again.memory.peaks["plain"]  # that of the recipe in hand
    assert again.memory == found.memory
    assert again.setting.rows * again.setting.accumulation == 16
    with pytest.raises(ValueError, match="the file exists"):
        write_recipe(tmp_path / "new.yaml", ["recipe.yaml"], lines, 0.012)


def test_a_plan_says_what_it_does_not_count(small_dir):
    text = describe(planner_of(small_dir).plan())
    assert "CUDA context" in text
    assert "fragmentation" in text
    assert "rows of `max_length` assumed" in text


# The plan of a trainer, for the dry run


@pytest.fixture
def trainer_of(model_dir, tmp_path):
    """The trainer of `qtuning sft`, not trained, and the options that it was made of."""
    rows = [{"prompt": "a" * (4 + i % 5), "completion": "b" * 8} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--model_name_or_path", model_dir, "--dataset_name", str(tmp_path / "rows.jsonl"), "--use_cpu", "true"]
    common += ["--output_dir", str(tmp_path / "run"), "--report_to", "none", "--budget", "25x50"]
    common += ["--scoring_batch_tokens", "256"]  # what is not given is looked for, which takes its time

    def make(*options: str):
        argv = [*common, *OPTIONS, *options]
        trainer = sft.build_trainer(*sft.parse(argv).dataclasses)
        trainer.end()
        return trainer, argv

    return make


@pytest.mark.parametrize(
    "options",
    [("--gradient_checkpointing", "false"), ("--load_in_4bit", "true", "--use_bnb_nested_quant", "true")],
    ids=["free", "four bits"],
)
def test_the_plan_of_a_trainer_is_that_of_its_recipe(trainer_of, options):
    trainer, argv = trainer_of(*options, "--lora_r", "4")
    facts = pickle.loads(pickle.dumps(Facts.of(trainer)))  # as they go to the other process
    own, recipes = facts.planner().plan(), make_planner(argv).plan()
    assert (own.setting, own.memory, own.verdict) == (recipes.setting, recipes.memory, recipes.verdict)
    assert own.time == pytest.approx(recipes.time, abs=0.01)  # of 40 rows in another order
    assert own.run == recipes.run
    line = one_line(own)
    assert f"{own.memory.bytes / GIB:.2f} GiB at the peak" in line
    assert "fits a card with 6 GB; a step takes" in line
    assert "does not fit this card with 0.1 GiB" in one_line(replace(own, card=0.1, verdict={"0.1": "does not fit"}))
    assert "fits this card with 8 GiB" in one_line(replace(own, card=8.0, verdict={"8": "fits"}))
    assert "is tight on this card with 8 GiB" in one_line(replace(own, card=8.0, verdict={"8": "tight"}))


def test_a_trainer_that_cannot_be_counted_says_why_in_one_line(trainer_of):
    trainer, _ = trainer_of("--optim", "adafactor")
    line = "Plan: not counted, since `qtuning plan` says: `optim` is 'adafactor': plan with 'adamw_torch_fused'"
    assert plan_line(trainer).startswith(line)
    trainer.args.optim = "adamw_torch"
    trainer.model.peft_config["default"].rank_pattern = {"q_proj": 2}
    assert plan_line(trainer).endswith("The LoRA has `rank_pattern`, which is not counted.")


def test_packed_and_streamed_rows_are_measured_too(tmp_path):
    args = QTuningSFTConfig(str(tmp_path), max_length=16, use_cpu=True, bf16=False)
    packed = {"input_ids": list(range(9)), "labels": [-100, 1, 2, -100, 4, 5, 6, 7, 8], "seq_lengths": [3, 6]}
    lengths = prepared_lengths(Dataset.from_list([packed, {**packed, "input_ids": list(range(9))}]), args)
    # Of the two documents the first tokens are not predicted, whether they are labelled or not.
    assert (lengths.tokens.tolist(), lengths.labelled.tolist(), lengths.longest, lengths.rows) == ([9, 9], [7, 7], 9, 2)
    stream = prepared_lengths(Dataset.from_list([packed]).to_iterable_dataset(), args)
    assert (stream.longest, stream.rows) == (16, None)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--card", "12", "--fit", "12"], "`--card` is 12 and `--fit` is 12: give only one of the two"),
        (["--card", "many"], "'many' is no size: give the card's memory in GB, such as 12"),
        (["--write", "x.yaml"], "`--write` is 'x.yaml': give `--config` and `--fit` too"),
        (["--recipes", "nowhere"], "`--recipes` is 'nowhere': give the folder"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        parse(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "`model_name_or_path` is not given: name a model"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "no.jsonl"], "no such file or folder"),
        (["--model_name_or_path", "MODEL", "--load_in_8bit", "true"], "8 bits are not counted"),
        (["--model_name_or_path", "MODEL", "--optim", "paged_adamw_8bit"], "`optim` is 'paged_adamw_8bit': plan with"),
        (["--model_name_or_path", "MODEL", "--use_fsdp"], "`use_fsdp` is given: plan without it"),
        (["--model_name_or_path", "MODEL", "--max_length", "None"], "`max_length` is not given and no data is named"),
        (["--model_name_or_path", "MODEL", "--budgt", "1"], "did you mean `--budget`"),
    ],
)
def test_recipes_that_cannot_be_planned(shape_dir, options, message):
    with pytest.raises(ValueError, match=message):
        make_planner([shape_dir if option == "MODEL" else option for option in options])


def test_models_that_cannot_be_planned(tmp_path):
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    Gemma2Config(**small).save_pretrained(tmp_path / "kinds")
    Qwen3MoeConfig(**small).save_pretrained(tmp_path / "experts")
    T5Config().save_pretrained(tmp_path / "t5")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "nothing"}')
    for name, message in {
        "kinds": r"differ in kind \(sliding_attention from layer 0, full_attention from layer 1\): add `--whole`",
        "experts": "a mixture of experts.*: plan for a dense model",
        "t5": "of the kind 't5': plan for a causal language model",
        "unknown": "whose config.json cannot be had .*: check the name and the connection",
        "nowhere": "whose config.json cannot be had .*: check the name and the connection",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_planner(["--model_name_or_path", str(tmp_path / name), "--max_length", "64"])


def test_a_model_that_needs_values_is_refused(monkeypatch, small_dir):
    def fails(*_args):
        raise RuntimeError("needs values")

    monkeypatch.setattr(FakeRun, "train", fails)
    with pytest.raises(ValueError, match=r"cannot be counted without values \(needs values\): measure a few steps"):
        planner_of(small_dir, "--lora_r", "4").plan()


# The recipes


def test_the_recipes_models_need_no_download():
    for path in recipe_paths(RECIPES):
        _, training_args, model_args, _ = make_parser().parse(["--config", str(path), "--use_cpu", "true"]).dataclasses
        assert model_config(model_args, training_args).vocab_size > 0


def test_every_recipe_names_the_smallest_card_that_it_fits_by_the_table():
    rows = table_rows()
    assert sorted(rows) == sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in recipe_paths(RECIPES))
    for path in recipe_paths(RECIPES):
        row = rows[str(path.relative_to(RECIPES).with_suffix(""))]
        args = make_parser().parse(["--config", str(path), "--use_cpu", "true"]).dataclasses[1]
        assert row["rows x tokens"] == f"{args.per_device_train_batch_size} x {args.max_length}"
        fitting = [card for card in TABLE_CARDS if re.fullmatch(r"[\d.]+x", row[f"{card} GB"])]
        assert named_card(path) == fitting[0], path.name


@pytest.mark.parametrize("name", ["smollm2-135m-lora", "llama-3.1-8b-qlora"])
def test_the_table_is_what_the_plans_say(name):
    """When this fails: `qtuning plan --recipes recipes`."""
    row, planner = table_rows()[name], recipe_planner(RECIPES / f"{name}.yaml")
    card = named_card(RECIPES / f"{name}.yaml")
    plan = planner.plan(card=card)
    assert (row["peak, GiB"], row["plain SFT's"]) == (f"{plan.least / GIB:.2f}", f"{plan.memory.plain_bytes / GIB:.2f}")
    assert row[f"{card:g} GB"] == f"{1 / plan.time['step']:.2f}x"
    for size in TABLE_CARDS:
        answer = verdict(plan.least, size)
        assert (row[f"{size} GB"] == "-", "tight" in row[f"{size} GB"]) == (answer == "does not fit", answer == "tight")


def test_the_table_is_written_between_its_marks(tmp_path, small_dir):
    recipe = {"model_name_or_path": small_dir, "max_length": 32, "dtype": "bfloat16", "bf16": True, "use_peft": True}
    (tmp_path / "mine.yaml").write_text("# Meant for a card with 8 GB.\n" + yaml.safe_dump(recipe))
    (tmp_path / "README.md").write_text("before\n")
    with pytest.raises(ValueError, match="put the lines '<!-- plans"):
        update_readme(tmp_path, recipe_paths(tmp_path), recipe_planner)
    (tmp_path / "README.md").write_text(f"before\n{START}\nold\n{END}\nafter\n")
    with pytest.raises(ValueError, match=r"not the one its first line names: mine.yaml \(6 GB\)"):
        update_readme(tmp_path, recipe_paths(tmp_path), recipe_planner)
    (tmp_path / "mine.yaml").write_text("# Meant for a card with 6 GB.\n" + yaml.safe_dump(recipe))
    assert not update_readme(tmp_path, recipe_paths(tmp_path), recipe_planner)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"before\n{START}\n\n| recipe |")
    assert text.endswith(f"|\n\n{END}\nafter\n")
    assert "`mine` | 8 x 32 |" in text


def table_rows() -> dict[str, dict[str, str]]:
    """The table in recipes/README.md, by recipe."""
    text = (RECIPES / "README.md").read_text().partition(START)[2].partition(END)[0].strip()
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return {cells[0].strip("`"): dict(zip(head, cells, strict=True)) for cells in lines}


# On a GPU


@pytest.mark.slow
def test_the_gpu_measurement_runs():
    """On a CPU, on a model of two narrow layers; what it measures is a GPU's matter."""
    script = Path(__file__).parent / "gpu" / "measure.py"
    options = ["--recipe", "smollm2-135m-lora", "--arm", "auto", "--cpu", "--layers", "2", "--hidden", "64"]
    command = [sys.executable, str(script), *options, "--length", "16", "--cap_gib", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["seconds"] > 0
    assert row["free_tokens"] > 0


def test_the_gpu_script_says_that_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([Path(__file__).parent / "gpu" / "run.sh"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "tests/gpu/run.sh: there is no GPU.\n")
