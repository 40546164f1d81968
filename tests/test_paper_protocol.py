"""`qtuning eval --protocol paper`: each rule of grading by hand, prompts word for word, and one command for Table 2."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import prompt_completion_rows, random_words, save_tokenizer, tiny_llama
from datasets import load_dataset
from lm_eval.tasks._yaml_loader import load_yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtuning_trl import cli
from qtuning_trl.scripts.sft import parse
from qtuning_trl.studies.compare import RESULT_NAME, load_comparison
from qtuning_trl.studies.evaluation import PAPER_TASK_FILES, Options, evaluate, load_tasks
from qtuning_trl.studies.evaluation_record import MODEL, PAPER_PROTOCOL, notes
from qtuning_trl.studies.paper_tasks.scoring import (
    arc_results,
    gsm8k_results,
    math_results,
    normalized,
    squad_questions,
    squad_results,
    triviaqa_results,
)

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 12
# SHA-256 of the examples of both prompts, made from OpenCompass's files and not from ours.
GSM8K_EXAMPLES = "b865a00a35d5fb975a66eb383fdb7b7026a8f533c2d58e4191b376c2edada426"
MATH_EXAMPLES = "a555d7a51b8c32ad18323a224ec1a64a6a8403e1bb7881d919ba28a5b0b463f8"


# The rules of grading


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("We add 3 and 4.\nThe answer is 1234", True),
        ("The answer is $1234.", True),  # a period behind a number begins no decimals
        ("The answer is 1234.0", True),
        ("1234 and then 5", False),  # the last number counts
        ("The answer is 1,234", False),  # a comma begins a new number: theirs reads 234
        ("The answer is -1234", False),
        ("no number", False),
    ],
)
def test_gsm8k_takes_the_last_number(reply, right):
    assert gsm8k_results({"answer": "600 + 634\n#### 1,234"}, [reply]) == {"exact_match": float(right)}


def test_text_is_cut_and_stripped_of_articles_and_punctuation():
    assert normalized("The Eiffel  Tower, in Paris") == "eiffel tower"
    assert normalized("an 'old' dog's day. And") == "old dogs day"
    assert normalized("the.") == ""


SQUAD = {
    "paragraphs": [
        {
            "context": "Rollo came in 911.",
            "qas": [
                {
                    "question": "Who came?", "is_impossible": False, "id": "a",
                    "answers": [{"text": "Rollo", "answer_start": 0}, {"text": "Rollo", "answer_start": 0}],
                },
                {
                    "question": "Who left?", "is_impossible": True, "id": "b", "answers": [],
                    "plausible_answers": [{"text": "Rollo", "answer_start": 0}],
                },
            ],
        }
    ]
}  # fmt: skip


def test_squad_questions_without_an_answer_have_a_plausible_one(tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps({"version": "v2.0", "data": [SQUAD]}))
    articles = load_dataset("json", data_files=str(tmp_path / "dev.json"), field="data", split="train")
    rows = [
        {"context": "Rollo came in 911.", "question": "Who came?", "answers": ["Rollo"]},
        {"context": "Rollo came in 911.", "question": "Who left?", "answers": ["Rollo", "impossible to answer"]},
    ]
    assert squad_questions(articles).to_list() == rows


@pytest.mark.parametrize(
    ("reply", "answerable", "impossible"),
    [
        (" The Rollo!\nQuestion: Who else?", True, True),
        (" It seems that the answer is rollo.", True, True),
        (" Impossible to answer.", False, True),
        ("\nRollo", False, False),  # the first line is empty
        (" Rollo came", False, False),
    ],
)
def test_squad_wants_the_first_line(reply, answerable, impossible):
    assert squad_results({"answers": ["Rollo"]}, [reply]) == {"exact_match": float(answerable)}
    assert squad_results({"answers": ["Rollo", "impossible to answer"]}, [reply]) == {"exact_match": float(impossible)}


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("\n The answer is David Lloyd George.\nQ: Who?", True),  # contains an alias
        (" A: Lloyd George", True),
        (" The answer is Lloyd, George", False),  # cut at the comma
        (" Churchill\nLloyd George", False),  # the first line alone
        (" Lloyd George? The answer is Churchill", False),  # what follows "answer is" alone
    ],
)
def test_triviaqa_wants_an_alias_in_the_first_line(reply, right):
    document = {"answer": "['The Lloyd George', 'D. L. George']"}
    # By theirs "D. L. George" is cut to "d", which "david lloyd george" contains, as nearly any reply does.
    assert triviaqa_results({"answer": "['The Lloyd George']"}, [reply]) == {"contains_alias": float(right)}
    assert triviaqa_results(document, [" The answer is David"]) == {"contains_alias": 1.0}


@pytest.mark.parametrize(
    ("reply", "exact", "verified"),
    [
        ("It is half. Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", True, True),
        ("Final Answer: The final answer is $\\frac12$. I hope", True, True),
        ("Final Answer: The final answer is $0.5$. I hope", False, True),  # theirs is cut at the period of 0.5
        ("Half of it. So it is $\\boxed{\\frac{1}{2}}$.", False, True),  # without "final answer" the first sentence
        ("No. Problem:\nx\nFinal Answer: The final answer is $\\frac{1}{2}$.", True, False),  # theirs goes on reading
        ("Final Answer: The final answer is $\\frac{1}{3}$.", False, False),
    ],
)
def test_math_takes_the_final_answer(reply, exact, verified):
    found = math_results({"solution": "Two in one: $\\boxed{\\frac{1}{2}}$."}, [reply])
    assert found == {"exact_match": float(exact), "math_verify": float(verified)}


def test_arc_divides_by_all_tokens():
    document = {"tokens": [10, 4, 5, 2], "answer": 0}
    # 1.0, 2.0, 1.2 and 4.0 nats a token: the longest text wins though its sum is not the lowest
    results = [(-10.0, False), (-8.0, False), (-6.0, True), (-8.0, False)]
    assert arc_results(document, results) == {"acc": 1.0}
    assert arc_results({**document, "answer": 2}, results) == {"acc": 0.0}


# The tasks with local data


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, and the six tasks on local rows, by our own files but for the data and the length of replies."""
    place = tmp_path_factory.mktemp("paper")
    tiny_llama().save_pretrained(place / "model")
    save_tokenizer(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(place / "with_start_token")
    model, plain = (kind.from_pretrained(place / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    generator = torch.Generator().manual_seed(3)

    def words() -> str:
        return random_words(generator, 2, 9)

    (place / "tasks").mkdir()

    def write(name: str, text: str, split: str, **changes) -> None:
        suffix = "csv" if name == "paper_triviaqa" else "json"
        (place / f"{name}.{suffix}").write_text(text)
        theirs = load_yaml(PAPER_TASK_FILES / f"{name}.yaml", resolve_func=False)
        kwargs = theirs.get("dataset_kwargs", {})
        kept = {key: kwargs[key] for key in ("field", "sep", "column_names") if key in kwargs}
        data = {**kept, "data_files": {split: str(place / f"{name}.{suffix}")}}
        if "custom_dataset" in theirs:
            data["path"] = "json"
        else:
            changes["dataset_path"] = suffix
        if theirs["output_type"] == "generate_until":
            changes["generation_kwargs"] = {**theirs["generation_kwargs"], "max_gen_toks": NEW_TOKENS}
        own = {"include": str(PAPER_TASK_FILES / f"{name}.yaml"), "task": name, "dataset_kwargs": data, **changes}
        (place / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(own))

    def lines(rows: list[dict]) -> str:
        return "\n".join(map(json.dumps, rows))

    def arc_row(choices: int) -> dict:
        texts = [words() for _ in range(choices)]
        return {"question": words(), "choices": {"text": texts, "label": list("ABCDE"[:choices])}, "answerKey": "B"}

    for name in ("paper_arc_easy", "paper_arc_challenge"):
        write(name, lines([arc_row(4 if index % 4 else 3) for index in range(16)]), "validation")
    # One question, whose answer is each digit once: one of ten is right if the reply ends with any.
    write("paper_gsm8k", lines([{"question": "a + b", "answer": f"so\n#### {n}"} for n in range(10)]), "test")
    write("paper_math", lines([{"problem": words(), "solution": "It is $\\boxed{2}$."} for _ in range(3)]), "test")
    asked = [(words(), index % 3) for index in range(9)]
    prompt = (
        "Answer these questions, your answer should be as simple as possible, start your answer with the prompt "
        "'The answer is '.\nQ: {}?\nA:"
    )
    trivia = [(text, greedy(model, plain, prompt.format(text)) if planted else "never") for text, planted in asked]
    write("paper_triviaqa", "\n".join(f'{text}\t"{[alias]}"' for text, alias in trivia), "validation")
    prompt = (
        "x\nAccording to the above passage, answer the following question. If it is impossible to answer according to "
        "the passage, answer `impossible to answer`:\nQuestion: {}\nAnswer:"
    )
    questions = []
    for text, planted in asked:
        reply = [{"text": greedy(model, plain, prompt.format(text)) if planted else "never"}]
        found = {"answers": [], "plausible_answers": reply} if planted == 2 else {"answers": reply}
        questions.append({"question": text, "is_impossible": planted == 2, **found})
    write("paper_squad", json.dumps({"data": [{"paragraphs": [{"context": "x", "qas": questions}]}]}), "validation")
    return place


def greedy(model, tokenizer, prompt: str) -> str:
    """What the model says, with nothing but transformers; as lm-eval does, a long prompt is cut from the left."""
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"][
        :, -(model.config.max_position_embeddings - NEW_TOKENS) :
    ]
    output = model.generate(inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)


def run(place: Path, output: str, *options: str) -> dict:
    common = ["--model", str(place / "model"), "--include_path", str(place / "tasks"), "--use_cpu"]
    assert cli.main(["eval", "--protocol", "paper", *common, "--output", str(place / output), *options]) == 0
    return json.loads((place / output / "eval.json").read_text())


@pytest.fixture(scope="module")
def record(place):
    return run(place, "greedy")


def value(record: dict, task: str) -> float:
    return next(row for row in record["tasks"] if row["task"] == task)["results"][MODEL]["value"]


def test_the_figures_are_those_of_plain_transformers(place, record):
    assert [row["task"] for row in record["tasks"]] == [paper.task for paper in PAPER_PROTOCOL]
    assert [f"{row['metric']},{row['filter']}" for row in record["tasks"]] == [p.metric for p in PAPER_PROTOCOL]
    assert value(record, "paper_gsm8k") == 0.1
    assert value(record, "paper_squad") == pytest.approx(6 / 9)  # by construction, three by a plausible answer
    assert value(record, "paper_triviaqa") == pytest.approx(6 / 9)
    values = {paper.task: value(record, paper.task) for paper in PAPER_PROTOCOL}
    alignment, reasoning = record["averages"]
    assert (alignment["protocol"], alignment["missing"], reasoning["missing"]) == ("paper", [], [])
    assert reasoning["results"][MODEL] == pytest.approx((values["paper_gsm8k"] + values["paper_math"]) / 2)
    assert alignment["results"][MODEL] == pytest.approx(
        (sum(values.values()) - values["paper_math"]) / 5,
    )


@pytest.mark.parametrize("tokenizer", ["model", "with_start_token"])
def test_arc_is_the_lowest_mean_loss_over_question_and_choice(place, tokenizer):
    found = run(place, f"arc_{tokenizer}", "--tasks", "paper_arc_easy", "--tokenizer", str(place / tokenizer))
    model, encoder = (
        AutoModelForCausalLM.from_pretrained(place / "model"), AutoTokenizer.from_pretrained(place / tokenizer),
    )  # fmt: skip
    right, by_sum, by_answer, rows = 0, 0, 0, 0
    for line in (place / "paper_arc_easy.json").read_text().splitlines():
        row = json.loads(line)
        if len(row["choices"]["text"]) != 4:
            continue
        sums, means, answers = [], [], []
        for choice in row["choices"]["text"]:
            ids = encoder(f"Question: {row['question']}\nAnswer: \n{choice}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            sums.append(float(losses.sum()))
            means.append(float(losses.mean()))
            answers.append(float(losses[-len(choice) :].mean()))
        rows += 1
        best = means.index(min(means))
        right += best == row["choices"]["label"].index(row["answerKey"])
        by_sum += best != sums.index(min(sums))
        by_answer += best != answers.index(min(answers))
    assert by_sum > 0  # so that neither the sum
    assert by_answer > 0  # nor the choice alone would do
    (task,) = found["tasks"]
    assert task["samples"]["evaluated"] == task["samples"]["in_task"] == rows == 12
    assert task["results"][MODEL]["value"] == pytest.approx(right / rows)


def test_the_prompts_are_theirs_word_for_word(record):
    prompts = {row["task"]: row["prompt"]["first_sample"]["prompt"] for row in record["tasks"]}
    shots = {row["task"]: row["num_fewshot"] for row in record["tasks"]}
    assert (shots["paper_gsm8k"], shots["paper_math"], shots["paper_squad"]) == (4, 4, 0)
    for task, ending, digest in (
        ("paper_gsm8k", "Question: a + b\nLet's think step by step\nAnswer:", GSM8K_EXAMPLES),
        ("paper_math", prompts["paper_math"][prompts["paper_math"].rindex("Problem:") :], MATH_EXAMPLES),
    ):
        assert prompts[task].endswith(ending)
        examples = prompts[task].removesuffix(ending)
        assert hashlib.sha256(examples.encode()).hexdigest() == digest
    assert prompts["paper_math"].endswith("\nSolution:\n")
    assert prompts["paper_squad"].startswith("x\nAccording to the above passage, answer the following question. If it")
    assert prompts["paper_squad"].endswith("\nAnswer:")
    assert prompts["paper_triviaqa"].startswith("Answer these questions, your answer should be as simple as possible")
    assert prompts["paper_triviaqa"].endswith("?\nA:")


def test_the_task_files_have_their_splits_and_lengths():
    files = {path.stem: load_yaml(path, resolve_func=False) for path in PAPER_TASK_FILES.glob("*.yaml")}
    assert set(files) == {paper.task for paper in PAPER_PROTOCOL}
    lengths = {task: file["generation_kwargs"]["max_gen_toks"] for task, file in files.items() if "arc" not in task}
    assert lengths == {"paper_gsm8k": 512, "paper_math": 512, "paper_squad": 50, "paper_triviaqa": 50}
    assert all(not file["generation_kwargs"]["do_sample"] for task, file in files.items() if "arc" not in task)
    assert {task: file.get("test_split", file.get("validation_split")) for task, file in files.items()} == {
        "paper_arc_easy": "validation", "paper_arc_challenge": "validation", "paper_gsm8k": "test",
        "paper_squad": "validation", "paper_triviaqa": "validation", "paper_math": "test",
    }  # fmt: skip


def test_what_differs_from_theirs_is_documented():
    evaluation, reproducing = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("evaluation", "reproducing"))
    table = evaluation[evaluation.index("## Protocol paper") : evaluation.index("## The adapter is checked")]
    assert all(f"`{paper.task}`" in table for paper in PAPER_PROTOCOL)
    recipes = {path.stem for path in (ROOT / "recipes" / "paper").glob("*.yaml")} - {"base", "table2"}
    assert all(f"`{recipe}`" in reproducing for recipe in recipes)
    assert "qtuning compare --config recipes/paper/table2.yaml\n" in reproducing


# Sampling


def test_sampled_replies_repeat_with_the_seed(place):
    model, tokenizer = (kind.from_pretrained(place / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    manager, loaded = load_tasks(["paper_triviaqa"], str(place / "tasks"), str(place / "model"))

    def replies(**options) -> list[str]:
        result = evaluate(model, tokenizer, manager, loaded, Options(**options))
        return [sample["resps"][0][0] for sample in result["samples"]["paper_triviaqa"]]

    first = replies(temperature=1.0, seed=1)
    assert replies(temperature=1.0, seed=1) == first
    assert replies(temperature=1.0, seed=2) != first
    likeliest = replies(temperature=0.0)
    assert likeliest == replies(temperature=0.0, seed=2) != first
    rows = [sample.split("\t")[0] for sample in (place / "paper_triviaqa.csv").read_text().splitlines()]
    prompt = "Answer these questions, your answer should be as simple as possible, start your answer with the prompt "
    assert likeliest[0].strip() == greedy(model, tokenizer, f"{prompt}'The answer is '.\nQ: {rows[0]}?\nA:").strip()


def test_sampling_reaches_the_model_and_the_record(place):
    found = run(place, "sampled", "--tasks", "paper_triviaqa", "--temperature", "1", "--seed", "7")
    (row,) = found["tasks"]
    used = row["prompt"]["first_sample"]["generation_kwargs"]
    assert {key: used[key] for key in ("do_sample", "temperature", "top_p", "top_k")} == {
        "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
    }  # fmt: skip
    assert (found["temperature"], found["seeds"]["torch"], found["protocol"]) == (1.0, 7, "paper")
    assert "Replies were sampled at temperature 1 with the seed 7." in notes(found)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--temperature", "-1"], "`--temperature` is -1: give 0 for greedy replies"),
        (["--num_fewshot", "0"], "`--num_fewshot` is given with `--protocol paper`, which sets the prompts"),
        (["--apply_chat_template"], "`--apply_chat_template` is given with `--protocol paper`"),
    ],
)
def test_bad_input_is_one_sentence(place, capsys, options, sentence):
    with pytest.raises(SystemExit) as stopped:
        run(place, "refused", *options)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("qtuning: error") == 1


# Table 2 from one command


def test_table_2_is_the_papers_grid():
    comparison = load_comparison(ROOT / "recipes" / "paper" / "table2.yaml")
    runs = [run for run in comparison.runs() if run.seed == 0]
    assert [(run.pruner, run.budget) for run in runs[:2]] == [("zero-shot", "100x100"), ("full data", "100x100")]
    assert len(runs) == 2 + 3 * 3
    for run in runs:
        options = [f"--{name}={value}" for name, value in {**comparison.options, **run.options}.items()]
        args = parse(["--config", comparison.recipe, *options, "--use_cpu", "--bf16", "false"]).dataclasses[1]
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 256


@pytest.mark.slow
def test_table_2_runs_from_one_command(place, tmp_path):
    rows = [
        {"instruction": row["prompt"], "output": row["completion"], "source": "s"} for row in prompt_completion_rows(64)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "base": str(ROOT / "recipes" / "paper" / "smollm2-1.7b-mathinstruct.yaml"),
        "model_name_or_path": str(place / "model"), "dataset_name": str(tmp_path / "rows.jsonl"), "max_steps": 1,
        "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 1, "dtype": "float32", "use_cpu": True,
        "bf16": False,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "local_paper.py").write_text(
        "from qtuning_trl.studies.evaluation import paper_accuracy\n\n\ndef reasoning(trainer):\n"
        f"    return paper_accuracy(trainer, ['paper_gsm8k', 'paper_math'], {str(place / 'tasks')!r}, limit=2)\n"
    )
    table = yaml.safe_load((ROOT / "recipes" / "paper" / "table2.yaml").read_text())
    changes = {
        "recipe": "recipe.yaml", "output_dir": str(tmp_path / "out"), "seeds": [0], "budgets": ["25x50"],
        "pruners": table["pruners"][:1],
        "options": {"test_split_size": 0.25}, "accuracy": "local_paper:reasoning",
    }  # fmt: skip
    (tmp_path / "table2.yaml").write_text(yaml.safe_dump({**table, **changes}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "qtuning_trl", "compare", "--config", str(tmp_path / "table2.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folders = sorted(path.parent for path in (tmp_path / "out").glob(f"*/{RESULT_NAME}"))
    assert len(folders) == 3  # zero-shot, full data, and a row
    for folder in folders:
        records = [json.loads((folder / "model" / f"eval_{kind}.json").read_text()) for kind in ("greedy", "sampled")]
        assert [record["temperature"] for record in records] == [0.0, 1.0]
        assert [row["task"] for row in records[1]["tasks"]] == ["paper_gsm8k", "paper_math"]
        share = records[1]["averages"][1]["results"][MODEL]
        assert json.loads((folder / RESULT_NAME).read_text())["accuracy"] == pytest.approx(share)
    assert "| Q-Tuning, as coded | 25x50 | 1 |" in (tmp_path / "out" / "comparison.md").read_text()
