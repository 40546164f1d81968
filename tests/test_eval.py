"""`qtuning eval`: lm-eval's figures against plain transformers, the check of the adapter, the record and averages."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from conftest import WORDS, random_words, save_tokenizer, tiny_llama
from lm_eval.tasks import TaskManager
from lm_eval.tasks.squadv2.task import SQuAD2
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qtuning_trl import cli
from qtuning_trl.scripts import eval as script
from qtuning_trl.studies.evaluation import load_tasks
from qtuning_trl.studies.evaluation_model import apply_adapter, check_vocabulary, load_tokenizer
from qtuning_trl.studies.evaluation_record import (
    ADAPTER,
    BASE,
    BY_TASK,
    MODEL,
    PAPER_TASKS,
    averages,
    markdown,
    notes,
    task_row,
)

SAMPLES = 12
CHOICES = ["a", "b", "c"]
NEW_TOKENS = 3


def lora(model: LlamaForCausalLM, seed: int | None = 0, **changes) -> PeftModel:
    """A LoRA that changes the model's answers; with `seed=None` one that changes nothing, as before training."""
    changes = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **changes}
    adapted = get_peft_model(model, LoraConfig(**changes))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    return adapted


def choice_task(name: str, data: Path, metrics: list[str], **changes) -> dict:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}} =",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": CHOICES,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "metadata": {"version": 2.0},
        **changes,
    }


def write_yaml(path: Path, content: dict) -> None:
    path.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, a trained adapter, their merger, and two local tasks with known answers."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("eval")
    base, merged = place / "base", place / "merged"
    for folder in (base, merged, place / "tasks"):
        folder.mkdir()
    tiny_llama().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)  # so that the adapter names it
    adapted = lora(model)
    adapted.save_pretrained(place / "adapter")
    adapted.merge_and_unload().save_pretrained(merged)
    for folder in (base, merged):
        save_tokenizer(folder)

    tokenizer = AutoTokenizer.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    prompts = [random_words(generator, 3, 12) for _ in range(SAMPLES)]
    base_model = AutoModelForCausalLM.from_pretrained(base)
    rows = []
    for index, prompt in enumerate(prompts):
        # What the base model generates is the answer in two thirds of the rows.
        answer = generated(base_model, tokenizer, prompt) if index % 3 else "never"
        rows.append({"prompt": prompt, "answer": index % len(CHOICES), "text": answer})
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_yaml(place / "tasks" / "choose.yaml", choice_task("choose", place / "rows.jsonl", ["acc", "acc_norm"]))
    spell = {
        **choice_task("spell", place / "rows.jsonl", ["exact_match"]),
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
    }
    del spell["doc_to_choice"]
    write_yaml(place / "tasks" / "spell.yaml", spell)
    return place


def generated(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)


def by_hand(folder: Path, rows: list[dict]) -> dict[str, float]:
    """Both accuracies with nothing but transformers, one sample at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = {"choose": 0, "spell": 0}
    for row in rows:
        inputs = tokenizer(row["prompt"] + " =", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(inputs).logits[0, -1]
        best = max(range(len(CHOICES)), key=lambda index: float(logits[WORDS.index(CHOICES[index])]))
        right["choose"] += best == row["answer"]
        right["spell"] += generated(model, tokenizer, row["prompt"]) == row["text"]
    return {task: count / len(rows) for task, count in right.items()}


def run_main(place: Path, output: str, *options: str) -> dict:
    tasks = [] if "--tasks" in options else ["--tasks", "choose,spell"]
    folder = place / output
    common = ["--include_path", str(place / "tasks"), "--use_cpu", "--output", str(folder)]
    assert cli.main(["eval", *tasks, *common, *options]) == 0
    return json.loads((folder / "eval.json").read_text())


@pytest.fixture(scope="module")
def record(place):
    """The base model and its adapter, side by side; the base is the one that the adapter names."""
    return run_main(place, "out", "--adapter", str(place / "adapter"))


def values(record: dict, column: str) -> dict[str, float]:
    return {row["task"]: row["results"][column]["value"] for row in record["tasks"]}


def test_the_figures_are_those_of_plain_transformers(place, record):
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    assert record["columns"] == [BASE, ADAPTER]
    base, adapted = by_hand(place / "base", rows), by_hand(place / "merged", rows)
    assert values(record, BASE) == pytest.approx(base)
    assert values(record, ADAPTER) == pytest.approx(adapted)
    assert base["spell"] == pytest.approx(2 / 3)  # by construction
    assert base["spell"] != adapted["spell"]
    assert base["choose"] != adapted["choose"]


def test_base_and_adapter_give_the_figures_of_the_two_models_alone(place, record):
    merged = run_main(place, "merged_out", "--model", str(place / "merged"))
    assert merged["columns"] == [MODEL]
    assert merged["adapter"] is None
    assert values(merged, MODEL) == values(record, ADAPTER)
    alone = run_main(place, "alone_out", "--adapter", str(place / "adapter"), "--no_base")
    assert alone["columns"] == [ADAPTER]
    assert values(alone, ADAPTER) == values(record, ADAPTER)


def test_the_record_says_what_was_asked_and_how(place, record):
    choose, spell = record["tasks"]
    assert (choose["metric"], choose["filter"], choose["num_fewshot"]) == ("acc", "none", 0)  # the first of two
    assert set(choose["results"][BASE]["all_metrics"]) == {
        "acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none",
    }  # fmt: skip
    counts = {"in_task": SAMPLES, "asked_for": SAMPLES, "evaluated": SAMPLES, "counted_by_metric": SAMPLES}
    assert choose["samples"] == spell["samples"] == counts
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    assert choose["prompt"] == {
        "description": "",
        "doc_to_text": "{{prompt}} =",
        "first_sample": {"prompt": rows[0]["prompt"] + " =", "continuations": [" a", " b", " c"]},
    }
    assert spell["prompt"]["first_sample"]["generation_kwargs"]["max_gen_toks"] == NEW_TOKENS
    assert choose["version"] == 2.0
    assert choose["source"] == str(place / "tasks" / "choose.yaml")
    value = choose["results"][BASE]["value"]  # of a mean of zeros and ones, with n - 1
    assert choose["results"][BASE]["stderr"] == pytest.approx(math.sqrt(value * (1 - value) / (SAMPLES - 1)))
    assert record["versions"]["lm_eval"] == lm_eval.__version__
    assert {"torch", "transformers", "peft", "qtuning-trl"} <= set(record["versions"])
    assert record["model"] == record["adapter"]["base_model_name_or_path"] == str(place / "base")
    assert record["adapter"]["modules"] == 6  # three of each of two layers
    assert record["adapter"]["largest_logit_difference"] > 0.1
    assert (record["dtype"], record["device"], record["chat_template"]["applied"]) == ("float32", "cpu", False)
    table = (place / "out" / "eval.md").read_text()
    assert f"| choose | acc | 0 | {SAMPLES} | {value:.4f} ± " in table


def test_few_shot_limit_and_chat_template_reach_the_prompt(place, record):
    options = ("--tasks", "choose", "--num_fewshot", "2", "--limit", "5", "--apply_chat_template")
    few = run_main(place, "few", "--adapter", str(place / "adapter"), *options)
    (row,) = few["tasks"]
    assert row["num_fewshot"] == 2
    assert row["samples"] == {"in_task": SAMPLES, "asked_for": 5, "evaluated": 5, "counted_by_metric": 5}
    prompt = row["prompt"]["first_sample"]["prompt"]
    assert prompt.count(" ? ") == 3  # what the template puts behind each user's turn
    assert prompt.count("</s>") == 2  # and behind the answers of the two examples
    assert few["chat_template"]["applied"]
    # Both models see the same examples, which are drawn at random.
    assert row["results"][BASE]["samples_hash"] == row["results"][ADAPTER]["samples_hash"]
    assert row["results"][BASE]["samples_hash"] != record["tasks"][0]["results"][BASE]["samples_hash"]
    assert row["config_hash"] != record["tasks"][0]["config_hash"]
    assert "choose: 5 of its 12 samples were evaluated, 5 asked for." in notes(few)


def test_4_bit_weights_are_evaluated(place):
    pytest.importorskip("bitsandbytes")
    four_bit = run_main(place, "four", "--adapter", str(place / "adapter"), "--load_in_4bit", "--tasks", "choose")
    assert four_bit["load_in_4bit"]
    assert 0 <= values(four_bit, ADAPTER)["choose"] <= 1
    assert four_bit["adapter"]["largest_logit_difference"] > 0.1


def test_the_command_runs_as_a_process(place, record):
    folder = place / "process"
    options = ["--adapter", str(place / "adapter"), "--tasks", "choose", "--include_path", str(place / "tasks")]
    command = [sys.executable, "-m", "qtuning_trl", "eval", *options, "--use_cpu", "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((folder / "eval.json").read_text())
    (again,), first = result["tasks"], record["tasks"][0]
    assert again["results"] == first["results"]
    assert again["config_hash"] == first["config_hash"]
    assert f"│ choose │ acc    │        0 │      {SAMPLES} │" in done.stdout
    assert f"Written to {folder / 'eval.json'} and .md" in done.stdout


def test_an_evaluation_that_fails_exits_with_1(place, tmp_path, capsys):
    # lm-eval tries a task's first document when it is loaded; this one fails at the second.
    task = choice_task("broken", place / "rows.jsonl", ["acc"], doc_to_text="{{prompt}}{{1 / (answer - 1)}}")
    write_yaml(tmp_path / "broken.yaml", task)
    options = ["--tasks", "broken", "--include_path", str(tmp_path), "--output", str(tmp_path / "out"), "--use_cpu"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--model", str(place / "base"), *options])
    assert stopped.value.code == 1
    assert "qtuning: error: ZeroDivisionError" in capsys.readouterr().err
    assert not (tmp_path / "out" / "eval.json").exists()


# The check that the adapter is applied


def other_llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**tiny_llama().config.to_dict(), **changes}))


def missing_weights(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("make", "damage", "sentence"),
    [
        (lambda: lora(tiny_llama(), seed=None), None, "changes nothing: the logits of a fixed text are the same"),
        (lambda: lora(other_llama(num_hidden_layers=3)), None, "0 weights are missing and 6 match no module, such as"),
        (lambda: lora(tiny_llama()), missing_weights, "6 weights are missing and 0 match no module, such as"),
        (lambda: lora(other_llama(hidden_size=32)), None, "does not fit the model .*size mismatch"),
        (lambda: lora(tiny_llama(), seed=None, init_lora_weights=False), "nan", "the logits are not numbers"),
    ],
    ids=["untrained", "other layers", "incomplete", "other size", "diverged"],
)
def test_an_adapter_that_is_not_applied_is_refused(place, tmp_path, make, damage, sentence):
    adapted = make()
    if damage == "nan":
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data.fill_(float("nan"))
    adapted.save_pretrained(tmp_path)
    if callable(damage):
        damage(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    with pytest.raises(ValueError, match=rf"`--adapter` is .*{sentence}"):
        apply_adapter(base, tokenizer, str(tmp_path), with_base=True)


def test_an_adapter_of_other_modules_is_refused_before_any_task(place, tmp_path, capsys):
    adapted = lora(tiny_llama())
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["c_attn"]}))
    with pytest.raises(SystemExit) as stopped:
        run_main(place, "refused", "--model", str(place / "base"), "--adapter", str(tmp_path))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "which does not fit the model (Target modules {'c_attn'} not found in the base model" in printed.err
    assert printed.err.count("qtuning: error") == 1
    assert "Evaluating" not in printed.out
    assert not (place / "refused" / "eval.json").exists()


def test_an_adapter_that_cannot_be_switched_off_needs_no_base(tmp_path):
    torch.manual_seed(0)
    model = other_llama(attention_bias=True)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    adapted = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), bias="lora_only")
    for name, weight in adapted.named_parameters():
        if name.endswith("bias"):
            weight.data += 1.0
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    for with_base in (True, False):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        if with_base:
            with pytest.raises(ValueError, match=r"cannot be switched off .*`--no_base`"):
                apply_adapter(base, tokenizer, str(tmp_path / "adapter"), with_base=True)
        else:
            _, applied = apply_adapter(base, tokenizer, str(tmp_path / "adapter"), with_base=False)
            assert applied["modules"] == 6


def test_a_base_other_than_the_adapters_is_a_warning(place, capsys):
    options = ("--tasks", "choose", "--limit", "1")
    run_main(place, "warned", "--model", str(place / "merged"), "--adapter", str(place / "adapter"), *options)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Warning: `--model` is '{place / 'merged'}', but the adapter names '{place / 'base'}'" in shown


# Bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "`--model` is not given: name a model or its folder, or give `--adapter`"),
        (["--model", "./nowhere"], "`--model` is './nowhere': no such folder"),
        (["--adapter", "./nowhere"], "`--adapter` is './nowhere': no such folder"),
        (["--adapter", "{place}/base"], "it holds no adapter_config.json; give the folder that training"),
        (["--model", "{place}/base", "--no_base"], "`--no_base` leaves nothing to evaluate without `--adapter`"),
        (["--model", "{place}/tasks"], "`--model` is '{place}/tasks', which cannot be loaded"),
        (["--model", "{place}/base", "--limit", "0"], "`--limit` is 0: give a number of at least 1"),
        (["--model", "{place}/base", "--num_fewshot", "-1"], "`--num_fewshot` is -1: give a number of at least 0"),
        (["--model", "{place}/base", "--batch_size", "many"], "`--batch_size` is 'many': give a number"),
        (["--model", "{place}/base", "--device", "tpu9"], "`--device` is 'tpu9': give one such as"),
        (["--model", "{place}/base", "--output", "{place}/rows.jsonl"], "which is a file: give a folder"),
        (["--model", "{place}/base", "--include_path", "nowhere"], "`--include_path` is 'nowhere': no such folder"),
    ],
)
def test_bad_input_is_one_sentence(place, capsys, options, sentence):
    filled = [option.format(place=place) for option in options]
    if "--include_path" not in filled:
        filled += ["--include_path", str(place / "tasks")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--tasks", "choose", *filled])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert sentence.format(place=place) in printed.err
    assert printed.err.count("qtuning: error") == 1
    assert "Evaluating" not in printed.out


def test_the_nearest_task_is_named():
    with pytest.raises(ValueError, match="`--tasks` has 'arc_eazy', which is no task: do you mean 'arc_easy'"):
        load_tasks(["arc_eazy"], None)


def test_data_that_cannot_be_loaded_are_one_sentence(tmp_path):
    arc = Path(lm_eval.__file__).parent / "tasks" / "arc"
    with pytest.raises(ValueError, match=r"`--tasks` has 'arc_easy', whose data cannot be loaded \(.+\): lm-eval's"):
        load_tasks(["arc_easy"], str(arc))
    write_yaml(tmp_path / "lost.yaml", choice_task("lost", tmp_path / "lost.jsonl", ["acc"]))
    with pytest.raises(ValueError, match=r"`--tasks` has 'lost', whose data cannot be loaded \(Unable to find .*lost"):
        load_tasks(["lost"], str(tmp_path))


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"run `pip install 'qtuning-trl\[eval\]'`"):
        script.check_arguments(script.make_parser().parse_args(["--model", "x"]))


def test_a_chat_template_that_is_missing_is_refused(place, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`--apply_chat_template` is given, but the tokenizer of .* has no chat"):
        load_tokenizer(str(tmp_path), None, "unused", with_chat_template=True)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    with pytest.raises(ValueError, match=f"has {len(WORDS) + 1} tokens and the model embeds {len(WORDS)}: merge"):
        check_vocabulary(model, tokenizer, "here")


# The paper's tasks


def test_the_papers_tasks_are_in_lm_eval_as_documented():
    folders = ("arc", "gsm8k", "squadv2", "triviaqa", "minerva_math", "benchmarks")
    tasks = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_path=[tasks / folder for folder in folders], include_defaults=False)
    documented = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    for paper in PAPER_TASKS:
        metric, filter_name = paper.metric.split(",")
        config = manager.task_index[paper.task].cfg
        one = manager.task_index[config["task"][0] if "group" in config else paper.task].cfg
        shown = f"`{metric}`" if filter_name == "none" else f"`{metric}`, `{filter_name}`"
        assert f"| {paper.name} | `{paper.task}` | {shown} | {one.get('num_fewshot') or 0} |" in documented
        if paper.task == "squadv2":
            assert metric in SQuAD2.higher_is_better(None)
            continue
        listed = config.get("metric_list") or config["aggregate_metric_list"]
        assert metric in [entry["metric"] for entry in listed]
        assert filter_name in [entry["name"] for entry in config.get("filter_list", [])] or filter_name == "none"


@pytest.fixture(scope="module")
def own_six(place):
    """The paper's six tasks on local rows, by lm-eval's own definitions; but for SQuAD, whose metric is on the Hub."""
    folder, theirs = place / "six", Path(lm_eval.__file__).parent / "tasks"
    folder.mkdir()
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]

    def write(name: str, source: str, data: list[dict], **changes) -> None:
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, data)))
        files = {split: str(folder / f"{name}.jsonl") for split in ("train", "validation", "test")}
        local = {"include": str(theirs / source), "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        write_yaml(folder / f"{name}.yaml", {**local, "task": name, **changes})

    questions = [{"question": row["prompt"], "answerKey": "ABC"[row["answer"]]} for row in rows]
    for name in ("arc_easy", "arc_challenge"):
        choices = {"label": ["A", "B", "C"], "text": CHOICES}
        write(name, f"arc/{name}.yaml", [{**question, "choices": choices} for question in questions])
    short = {"until": ["\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    sums = [{"question": row["prompt"], "answer": "1 + 1 = 2\n#### 2"} for row in rows]
    write("gsm8k", "gsm8k/gsm8k.yaml", sums, generation_kwargs=short)
    trivia = [{"question": row["prompt"], "answer": {"aliases": ["never", row["text"]]}} for row in rows]
    write("triviaqa", "triviaqa/default.yaml", trivia, generation_kwargs=short, doc_to_text="{{question}}")
    problems = [{"problem": row["prompt"], "solution": "It is $\\boxed{2}$."} for row in rows]
    for part in (
        "algebra",
        "counting_and_prob",
        "geometry",
        "intermediate_algebra",
        "num_theory",
        "prealgebra",
        "precalc",
    ):
        name = f"minerva_math_{part}"
        write(name, "minerva_math/minerva_math_algebra.yaml", problems, generation_kwargs=short)
    write_yaml(folder / "squadv2.yaml", choice_task("squadv2", place / "rows.jsonl", ["acc"]))
    return folder


def test_own_files_can_stand_for_the_six_tasks_and_give_both_averages(place, own_six):
    arguments = ["--model", str(place / "base"), "--include_path", str(own_six), "--output", str(place / "all")]
    assert cli.main(["eval", *arguments, "--use_cpu"]) == 0
    record = json.loads((place / "all" / "eval.json").read_text())
    assert [row["task"] for row in record["tasks"]] == [paper.task for paper in PAPER_TASKS]
    found = {row["task"]: row for row in record["tasks"]}
    shown = {task: f"{row['metric']},{row['filter']}" for task, row in found.items()}
    assert shown == {paper.task: paper.metric for paper in PAPER_TASKS} | {"squadv2": "acc,none"}
    assert {task: row["num_fewshot"] for task, row in found.items() if row["num_fewshot"]} == {
        "gsm8k": 5, "minerva_math": 4,
    }  # fmt: skip
    assert found["gsm8k"]["prompt"]["first_sample"]["prompt"].count("Question:") == 6
    assert found["minerva_math"]["samples"]["evaluated"] == 7 * SAMPLES
    assert found["triviaqa"]["source"] == str(own_six / "triviaqa.yaml")
    value = {task: row["results"][MODEL]["value"] for task, row in found.items()}
    assert value["triviaqa"] == pytest.approx(2 / 3)  # the rows of which an alias is what the model generates
    five = ["arc_easy", "arc_challenge", "gsm8k", "squadv2", "triviaqa"]
    expected = {"alignment": five, "reasoning": ["gsm8k", "minerva_math"]}
    for average in record["averages"]:
        tasks = expected[average["group"]]
        assert (average["tasks"], average["missing"]) == (tasks, [])
        assert average["results"][MODEL] == pytest.approx(sum(value[task] for task in tasks) / len(tasks))


def row(task: str, **figures) -> dict:
    return {"task": task, "results": {column: {"value": value} for column, value in figures.items()}}


def test_an_average_that_lacks_a_task_is_none_and_says_so():
    rows = [row("gsm8k", base=0.2, adapter=0.4), row("minerva_math", base=0.1, adapter=0.1), row("own", base=1.0)]
    alignment, reasoning = averages(rows)
    assert reasoning["results"] == {"base": pytest.approx(0.15), "adapter": pytest.approx(0.25)}
    assert alignment["results"] == {"base": None, "adapter": None}
    assert alignment["missing"] == ["arc_easy", "arc_challenge", "squadv2", "triviaqa"]
    assert (
        "No average for alignment: arc_easy, arc_challenge, squadv2, triviaqa not evaluated "
        "(it is over arc_challenge, arc_easy, gsm8k, squadv2, triviaqa)."
    ) in notes({"averages": [alignment, reasoning], "tasks": []})
    assert averages([row("own", base=1.0)]) == []


def test_squad_counts_the_questions_with_an_answer_as_a_share():
    def result(answers: list[list[str]], exact: float) -> dict:
        hashes = {"doc_hash": "", "prompt_hash": "", "target_hash": ""}
        samples = [
            {"filter": "none", "doc": {"answers": {"text": text}}, "arguments": [("p", {"until": []})], **hashes}
            for text in answers
        ]
        return {
            "results": {"squadv2": {"alias": "squadv2", "exact,none": 1.0, "HasAns_exact,none": exact,
                                    "HasAns_exact_stderr,none": "N/A"}},
            "samples": {"squadv2": samples}, "n-samples": {"squadv2": {"original": 9, "effective": len(samples)}},
            "configs": {"squadv2": {}}, "n-shot": {"squadv2": 0}, "versions": {"squadv2": 3},
        }  # fmt: skip

    found = task_row("squadv2", ["squadv2"], {MODEL: result([["x"], [], ["y"], []], 50.0)}, limit=4)
    assert found["results"][MODEL]["value"] == 0.5  # lm-eval says 50
    assert found["results"][MODEL]["stderr"] is None
    assert found["samples"] == {"in_task": 9, "asked_for": 4, "evaluated": 4, "counted_by_metric": 2}
    assert found["paper_name"] == BY_TASK["squadv2"].name == "SQuAD"
    # lm-eval's 0 for no question at all is no figure.
    none = task_row("squadv2", ["squadv2"], {MODEL: result([[], []], 0.0)}, limit=2)
    assert none["results"][MODEL]["value"] is None
    record = {
        "columns": [MODEL], "tasks": [found], "averages": averages([found]), "model": "m", "adapter": None,
        "chat_template": {"applied": False}, "date": "d", "versions": {},
    }  # fmt: skip
    assert "| SQuAD (squadv2) | HasAns_exact | 0 | 2 of 9 | 0.5000 |" in markdown(record)
    assert "squadv2: HasAns_exact is about 2 of the 4 samples evaluated." in notes(record)
