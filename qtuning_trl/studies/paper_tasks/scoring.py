"""
How OpenCompass 0.4.2 reads the data of the paper's tasks and grades the replies: what its task files cannot say.

The rules are those of github.com/open-compass/opencompass at 0.4.2, in our own words; the file that each is from is
named. Where a rule looks odd it is theirs, and docs/evaluation.md says so.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset

NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")
CHOICES = 4


# ARC: the choice with the lowest mean loss over prompt and choice


def arc(
    path: str,
    name: str | None = None,
    data_files: Any = None,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """
    ARC's validation split, only questions with four choices (datasets/arc.py).

    Args:
        path (`str`), name (`str`, *optional*), data_files (*optional*): What `datasets.load_dataset` takes.
        tokenizer (`str`, *optional*): Name or folder of the tokenizer, which counts the tokens; lm-eval passes it on
            from the `metadata` of its task manager.
        pretrained (`str`, *optional*): The model's, if there is no `tokenizer`.

    Returns:
        `dict`: The split `validation` with the columns of [`arc_document`].

    Raises:
        `ValueError`: If no tokenizer is named.
    """
    from transformers import AutoTokenizer

    named = tokenizer or pretrained
    if named is None:
        raise ValueError("The tokens of a choice are counted: name a `tokenizer` in the metadata of the tasks")
    encoder = AutoTokenizer.from_pretrained(named)
    rows = load_dataset(path, name, data_files=data_files, split="validation")
    kept = [row for row in rows if len(row["choices"]["text"]) == CHOICES]
    return {"validation": Dataset.from_list([arc_document(row, encoder) for row in kept])}


def arc_document(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """
    A question of ARC with whole texts to score: question and choice with a line break between.

    vLLM scores every token but the first of the sequence. That is a start token where the tokenizer adds one: lm-eval
    puts it before an empty context. Otherwise it is the first token of the text, which becomes the context.

    Returns:
        `dict`: `question`, `context`, `choices` (what follows the context), `tokens` (how many of each text are
        scored), `answer` (index of the right choice).
    """
    texts = [f"Question: {row['question']}\nAnswer: \n{choice}" for choice in row["choices"]["text"]]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    starts = tokenizer.bos_token_id is not None and encoded["input_ids"][0][0] == tokenizer.bos_token_id
    context = "" if starts else texts[0][: encoded["offset_mapping"][0][0][1]]
    return {
        "question": row["question"],
        "context": context,
        "choices": [text[len(context) :] for text in texts],
        "tokens": [len(ids) - 1 for ids in encoded["input_ids"]],
        "answer": list(row["choices"]["label"]).index(row["answerKey"]),
    }


def arc_results(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Whether the right text has the lowest mean loss in nats per token (models/vllm.py); the first one of a tie."""
    losses = [-loglikelihood / tokens for (loglikelihood, _), tokens in zip(results, document["tokens"], strict=True)]
    return {"acc": float(losses.index(min(losses)) == document["answer"])}


# GSM8K: the last number


def gsm8k_results(document: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether the reply's last number is the answer (datasets/gsm8k.py): digits, so a comma begins a new number."""
    answer = int(document["answer"].split("#### ")[1].replace(",", ""))
    numbers = NUMBER.findall(results[0])
    return {"exact_match": float(bool(numbers) and abs(float(numbers[-1]) - answer) < 1e-6)}


# SQuAD 2.0 and TriviaQA: normalised text


def normalized(text: str) -> str:
    """
    Text up to the first period, comma or line break, without punctuation and articles, with single blanks
    (utils/text_postprocessors.py: `general_postprocess`), in lower case.
    """
    words = re.sub(r"[^\w\s]", "", re.split(r"[\n.,]", text.lower(), maxsplit=1)[0])
    return " ".join(re.sub(r"\b(a|an|the)\b", "", words).split())


def squad_questions(articles: Dataset) -> Dataset:
    """
    The questions of SQuAD 2.0's own file, one a row (datasets/squad20.py).

    Args:
        articles (`Dataset`): With a column `paragraphs`, the entries of the file's `data`.

    Returns:
        `Dataset`: `context`, `question`, `answers`: of a question that has none, the plausible ones and "impossible to
        answer".
    """
    rows = []
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                impossible = question["is_impossible"]
                answers = question["plausible_answers"] if impossible else question["answers"]
                texts = dict.fromkeys(answer["text"] for answer in answers or [])
                rows.append(
                    {
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": [*texts, *(["impossible to answer"] if impossible else [])],
                    }
                )
    return Dataset.from_list(rows)


def squad_results(document: Mapping[str, Sequence[str]], results: Sequence[str]) -> dict[str, float]:
    """Whether the first line, or what follows "answer is" in it, equals an answer (datasets/squad20.py)."""
    reply = normalized(results[0].split("\n")[0].lower().split("answer is")[-1])
    return {"exact_match": float(any(reply == normalized(answer) for answer in document["answers"]))}


def triviaqa_results(document: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """
    Whether the first line, or what follows "answer is", "a:" or "answer:" in it, contains an alias (datasets/
    triviaqa.py). An alias that normalises to nothing is in every reply.
    """
    reply = results[0].strip().split("\n")[0].lower()
    for mark in ("answer is", "a:", "answer:"):
        reply = reply.split(mark)[-1]
    reply = normalized(reply)
    return {"contains_alias": float(any(normalized(alias) in reply for alias in ast.literal_eval(document["answer"])))}


# MATH: the final answer


def math(path: str, names: Sequence[str | None] = (None,), data_files: Any = None, **_: Any) -> dict[str, Dataset]:
    """MATH's test split, all of its subjects (`names`) one after the other."""
    parts = [load_dataset(path, name, data_files=data_files, split="test") for name in names]
    return {"test": concatenate_datasets(parts)}


def math_results(document: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """
    Whether the final answer equals the boxed one of the solution (datasets/math.py).

    The reply is cut at its periods, those of decimal numbers too, and the first part that holds "final answer" is
    taken, or else the first of all. It is normalised as Minerva's is, and compared as Hendrycks' code does. Beside it
    math-verify's word on the reply up to the next problem, as for lm-eval's `minerva_math`.
    """
    from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed
    from lm_eval.tasks.minerva_math.utils import normalize_final_answer
    from math_verify import parse, verify

    parts = results[0].split(".")
    part = next((part for part in parts if "final answer" in part.lower()), parts[0])
    answer = normalize_final_answer(re.split("final answer is", part, flags=re.IGNORECASE)[-1])
    solution = document["solution"]
    return {
        "exact_match": float(is_equiv(answer, remove_boxed(last_boxed_only_string(solution)))),
        "math_verify": float(verify(parse(solution), parse(results[0].split("Problem:")[0]))),
    }
