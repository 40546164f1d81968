"""Taking rows apart, pruning documents, packing, splitting into micro-batches, and grouping a pool for scoring."""

import copy
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset

from qtuning_trl.step.micro_batches import pack_rows, split_evenly
from qtuning_trl.step.sample import (
    IGNORE,
    SAMPLE_ID,
    Sample,
    answer_lengths,
    answer_mask,
    number_rows,
    protected_mask,
    prune_document,
    split_documents,
)
from qtuning_trl.step.scoring import score_documents, scoring_batches


def document(input_ids, labels=None, **extra):
    labels = input_ids if labels is None else labels
    return Sample(np.array(input_ids, dtype=np.int64), np.array(labels, dtype=np.int64), sample_id=-1, **extra)


def with_prompt(prompt: int, answer: int, start: int = 10):
    """A document of `prompt` + `answer` distinct tokens, from `start` on."""
    ids = list(range(start, start + prompt + answer))
    return document(ids, [IGNORE] * prompt + ids[prompt:])


def as_lists(documents):
    """What is told of each document, its id excepted."""
    plain = vars(document([]))
    told = [{key: value for key, value in vars(doc).items() if value is not plain[key]} for doc in documents]
    return [{key: np.asarray(value).tolist() for key, value in doc.items() if key != SAMPLE_ID} for doc in told]


# split_documents


def test_a_row_is_one_document():
    example = {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7], "source": "a", "other": 1}
    (whole,) = split_documents(example)
    assert as_lists([whole]) == [{"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}]
    assert whole.input_ids.dtype == whole.labels.dtype == np.int64
    (grouped,) = split_documents(example, "source")
    assert grouped.group == "a"


def test_without_labels_every_token_is_trained_on():
    (whole,) = split_documents({"input_ids": [5, 6, 7]})
    assert whole.labels.tolist() == [5, 6, 7]
    packed = split_documents({"input_ids": [5, 6, 7], "seq_lengths": [2, 1]})
    assert as_lists(packed) == [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]


def test_a_packed_row_is_its_documents():
    example = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [IGNORE, 2, IGNORE, IGNORE, 5, 6], "seq_lengths": [2, 3, 1]}
    assert as_lists(split_documents(example)) == [
        {"input_ids": [1, 2], "labels": [IGNORE, 2]},
        {"input_ids": [3, 4, 5], "labels": [IGNORE, IGNORE, 5]},
        {"input_ids": [6], "labels": [6]},
    ]
    one = {"input_ids": [1, 2], "labels": [1, 2], "seq_lengths": [2]}
    assert as_lists(split_documents(one)) == [{"input_ids": [1, 2], "labels": [1, 2]}]


def test_a_sample_id_is_the_row_number_or_a_hash_of_the_tokens():
    rows = number_rows(Dataset.from_list([{"input_ids": [5, 6]}, {"input_ids": [5, 6]}, {"input_ids": [7]}]))
    assert [split_documents(row)[0].sample_id for row in rows.shuffle(seed=1)] == rows.shuffle(seed=1)[SAMPLE_ID]
    assert sorted(rows[SAMPLE_ID]) == [0, 1, 2]
    own = Dataset.from_dict({"input_ids": [[5], [6]], SAMPLE_ID: [40, 30]})
    assert number_rows(own)[SAMPLE_ID] == [40, 30]
    with pytest.raises(ValueError, match=r"has the column 'sample_id' with values of type .*: rename it, or give"):
        number_rows(Dataset.from_dict({SAMPLE_ID: ["a", "b"]}))

    packed = split_documents(
        {"input_ids": [1, 2, 3, 4, 3, 4], "labels": [1, 2, 3, 4, IGNORE, 4], "seq_lengths": [2] * 3}
    )
    (alone,) = split_documents({"input_ids": [3, 4], "labels": [3, 4]})
    first, second, third = (doc.sample_id for doc in packed)
    assert second == alone.sample_id
    assert len({first, second, third}) == 3  # the third has other labels
    assert all(0 <= doc.sample_id < 2**63 for doc in packed)


# Masks


def test_the_answer_mask_is_that_of_the_shifted_labels():
    documents = [
        document([1, 2, 3, 4], [IGNORE, IGNORE, 3, 4]),
        document([1, 2, 3], [1, 2, 3]),  # its first token has nothing before it to be predicted from
        document([1], [1]),
        document([1, 2, 3, 4, 5], [IGNORE, 2, IGNORE, 4, IGNORE]),
    ]
    mask = answer_mask(documents)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
    assert answer_lengths(documents) == mask.sum(dim=1).tolist() == [2, 2, 0, 2]


def test_the_answer_mask_of_nothing():
    assert answer_mask([]).shape == (0, 0)
    assert answer_lengths([]) == []
    assert answer_mask([document([1]), document([2])]).shape == (2, 0)


def test_the_answer_mask_of_a_packed_row_is_not_that_of_one_long_document():
    row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "seq_lengths": [2, 2]}
    assert answer_lengths(split_documents(row)) == [1, 1]


def test_protected_positions_are_shifted_like_the_answers():
    documents = [document([9, 5, 9, 7]), document([9, 8]), document([8])]
    shape = answer_mask(documents).shape
    assert protected_mask(documents, {9}, shape).int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert protected_mask(documents, {5, 7, 8}, shape).int().tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 0]]
    nobody = protected_mask(documents, set(), shape)
    assert nobody.dtype == torch.bool
    assert nobody.shape == shape
    assert not nobody.any()


# prune_document


def test_pruned_tokens_leave_the_loss_or_the_sequence():
    whole = document([1, 2, 3, 4, 5, 6], [IGNORE, IGNORE, 3, 4, IGNORE, 6], group="a")
    before = copy.deepcopy(whole)
    # Entry j stands for token j + 1. Tokens 3 and 6 stay, 4 goes; the prompts 1, 2 and 5 stay, whatever m says.
    keep = np.array([False, True, False, False, True, True, True])
    masked, dropped = prune_document(whole, keep, drop=False), prune_document(whole, keep, drop=True)
    assert as_lists([masked]) == [
        {
            "input_ids": [1, 2, 3, 4, 5, 6],
            "labels": [IGNORE, IGNORE, 3, IGNORE, IGNORE, 6],
            "group": "a",
            "pruned": True,
            "kept_mask": [True, False, True],
        }
    ]
    assert as_lists([dropped]) == [
        {
            "input_ids": [1, 2, 3, 5, 6],
            "labels": [IGNORE, IGNORE, 3, IGNORE, 6],
            "group": "a",
            "pruned": True,
            "kept_mask": [True, False, True],
        }
    ]
    assert prune_document(whole, np.ones(5, dtype=bool), drop=False).pruned is False
    assert as_lists([whole]) == as_lists([before])
    assert masked.labels.dtype == dropped.labels.dtype == np.int64


def test_the_first_token_of_a_document_never_leaves():
    whole = document([1, 2, 3])  # trained on throughout, yet its first token has no score
    nothing = np.zeros(2, dtype=bool)
    assert prune_document(whole, nothing, drop=True).input_ids.tolist() == [1]
    assert prune_document(whole, nothing, drop=False).labels.tolist() == [1, IGNORE, IGNORE]


@pytest.mark.parametrize("drop", [False, True])
def test_pruning_keeps_the_prompt_and_counts_right(drop):
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 30))
        ids = rng.permutation(1000)[:size]
        trained = rng.random(size) < rng.random()
        whole = document(ids, np.where(trained, ids, IGNORE))
        before = copy.deepcopy(whole)
        keep = (
            rng.random(size - 1 + int(rng.integers(0, 4))) < 0.5
        )  # rows of the pool's mask are as long as its longest
        result = prune_document(whole, keep, drop)

        assert as_lists([whole]) == as_lists([before])
        survivors = [t for t in range(size) if t == 0 or not trained[t] or keep[t - 1]]
        if drop:
            assert result.input_ids.tolist() == ids[survivors].tolist()
            assert result.labels.tolist() == whole.labels[survivors].tolist()
        else:
            assert result.input_ids.tolist() == ids.tolist()
            assert result.labels.tolist() == [whole.labels[t] if t in survivors else IGNORE for t in range(size)]
        assert answer_lengths([result]) == [int((trained[1:] & keep[: size - 1]).sum())]


# pack_rows


def test_packing_by_hand():
    # Longest first into rows of 10: 7 | 6, then 4 beside the 6 (beside the 7 only 3 are free), 3 beside the 7, and 2
    # opens a third row.
    documents = [with_prompt(1, size - 1, start=100 * size) for size in (2, 7, 3, 6, 4)]
    rows = [row.as_example() for row in pack_rows(documents, 10)]
    assert [row["seq_lengths"] for row in rows] == [[7, 3], [6, 4], [2]]
    assert rows[0]["input_ids"].tolist() == [*range(700, 707), *range(300, 303)]
    assert rows[0]["labels"].tolist() == [IGNORE, *range(701, 707), IGNORE, 301, 302]


def test_packing_prefers_the_tightest_row():
    # Rows of 20: 14 leaves 6; 11 opens a row and leaves 9, 7 fits only there and leaves 2. The 2 would fit the first
    # row, but the second is tighter.
    documents = [with_prompt(0, size, start=100 * size) for size in (2, 7, 11, 14)]
    assert [list(map(len, row.samples)) for row in pack_rows(documents, 20)] == [[14], [11, 7, 2]]


def test_packing_loses_nothing_and_overfills_no_row():
    rng = np.random.default_rng(1)
    for _ in range(100):
        max_length = int(rng.integers(1, 40))
        documents, start = [], 0
        for _ in range(int(rng.integers(1, 30))):
            size = int(rng.integers(1, max_length + 1))
            prompt = int(rng.integers(0, size))
            documents.append(with_prompt(prompt, size - prompt, start=start))
            start += size
        before = copy.deepcopy(documents)
        rows = [row.as_example() for row in pack_rows(documents, max_length)]

        assert as_lists(documents) == as_lists(before)
        assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= max_length for row in rows)
        # Every document once, with its tokens in order and its labels beside them.
        unpacked = [doc for row in rows for doc in split_documents(row)]
        by_tokens = lambda doc: doc.input_ids.tolist()  # noqa: E731
        assert as_lists(sorted(unpacked, key=by_tokens)) == as_lists(sorted(documents, key=by_tokens))
        # Best fit leaves no two rows that would fit into one.
        lengths = sorted(len(row["input_ids"]) for row in rows)
        assert len(rows) == 1 or lengths[0] + lengths[1] > max_length


def test_packing_nothing():
    assert pack_rows([], 10) == []


# split_evenly


def test_micro_batches_are_even_and_sorted():
    rng = np.random.default_rng(2)
    for size in range(40):
        rows = [with_prompt(0, int(length), start=1000 * i) for i, length in enumerate(rng.integers(1, 9, size))]
        for count in range(1, 45):
            parts = split_evenly(rows, count)
            sizes = [len(part) for part in parts]
            assert len(parts) == count
            assert max(sizes) - min(sizes) <= 1
            dealt = [row for part in parts for row in part]
            assert Counter(map(id, dealt)) == Counter(map(id, rows))
            lengths = [len(row.input_ids) for row in dealt]
            assert lengths == sorted(lengths, reverse=True)


def test_rows_of_one_length_stay_in_order():
    rows = [with_prompt(0, 3, start=100 * i) for i in range(5)]
    assert [row.input_ids[0] for part in split_evenly(rows, 2) for row in part] == [0, 100, 200, 300, 400]


# Scoring


@pytest.mark.parametrize("padding_free", [False, True])
def test_scoring_batches_hold_every_sample_once_within_the_budget(padding_free):
    rng = np.random.default_rng(3)
    for _ in range(200):
        lengths = rng.integers(1, 50, int(rng.integers(0, 40))).tolist()
        budget = int(rng.integers(1, 120))
        batches = scoring_batches(lengths, budget, padding_free)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            sizes = [lengths[index] for index in batch]
            cost = sum(sizes) if padding_free else max(sizes) * len(sizes)
            assert cost <= budget or len(batch) == 1
        # No sample begins a batch that had room for it in the one before.
        for before, after in pairwise(batches):
            sizes = [lengths[index] for index in (*before, after[0])]
            assert (sum(sizes) if padding_free else max(sizes) * len(sizes)) > budget


def test_scoring_batches_by_hand():
    # Longest first: 9 5 5 3 2. Padded, each sample costs what the first of its batch does: with 12 tokens
    # 9 | 5 + 5 | 3 + 3, with 15 tokens 9 | 5 + 5 + 5 | 2. Flattened, each costs its own: 9 + 5 | 5 + 3 + 2.
    assert scoring_batches([2, 5, 9, 3, 5], 12, padding_free=False) == [[2], [1, 4], [3, 0]]
    assert scoring_batches([2, 5, 9, 3, 5], 15, padding_free=False) == [[2], [1, 4, 3], [0]]
    assert scoring_batches([2, 5, 9, 3, 5], 15, padding_free=True) == [[2, 1], [4, 3, 0]]
    # What is longer than the budget goes alone, and nothing joins it.
    assert scoring_batches([1, 20, 1], 4, padding_free=True) == [[1], [0, 2]]
    assert scoring_batches([1, 20, 1], 4, padding_free=False) == [[1], [0, 2]]
    assert scoring_batches([], 4, padding_free=True) == []


@pytest.mark.parametrize("padding_free", [False, True])
def test_scores_land_on_their_tokens(padding_free):
    """Whatever the batches, the value of a token ends up in its row and column, with the sign of a loss."""
    rng = np.random.default_rng(4)
    documents, start = [], 1
    for size in (3, 9, 1, 6, 6, 2):
        ids = np.arange(start, start + size)
        documents.append(document(ids, np.where(rng.random(size) < 0.6, ids, IGNORE)))
        start += size
    seen = []

    def forward(batch):
        seen.append(len(batch))
        tokens = [int(t) for doc in batch for t in doc.labels[1:] if t != IGNORE]
        return -torch.tensor(tokens, dtype=torch.float32) / 7, torch.tensor(tokens, dtype=torch.float32) / 3

    mask = answer_mask(documents)
    batches = scoring_batches([len(doc.labels) for doc in documents], 12, padding_free)
    values = score_documents(documents, mask, batches, forward)
    assert len(seen) == len(batches) > 1

    tokens = torch.zeros(mask.shape)
    for row, doc in enumerate(documents):
        tokens[row, : len(doc.input_ids) - 1] = torch.from_numpy(doc.input_ids[1:]).float()
    assert mask.any()
    assert not mask.all()
    assert torch.equal(values.nll, (tokens / 7).double() * mask)
    assert torch.equal(values.entropy, (tokens / 3).double() * mask)
    assert torch.equal(values.answer_mask, mask)
    assert values.nll.dtype == values.entropy.dtype == torch.float64

    part = values.rows(slice(1, 4))
    assert torch.equal(part.nll, values.nll[1:4])
    assert torch.equal(part.entropy, values.entropy[1:4])
    assert torch.equal(part.answer_mask, mask[1:4])
