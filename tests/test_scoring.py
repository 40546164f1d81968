"""Selection that costs little: counted work, the lean head, small micro-batches, reused, partial and proxy scores."""

import math

import numpy as np
import pytest
import torch
import trl.trainer.utils as trl_head
from conftest import prompt_completion_rows, tiny_llama
from datasets import Dataset
from test_trainer import COMMON, PACKED, PADDING_FREE, Recorder, losses, make_trainer, weights
from transformers import PreTrainedTokenizerFast

from qtuning_trl import QTuningSFTConfig
from qtuning_trl.host.head import lean_lm_head
from qtuning_trl.host.loop import without_checkpointing
from qtuning_trl.step.micro_batches import Row, pack_rows
from qtuning_trl.step.sample import split_documents
from qtuning_trl.step.score_cache import FILE_NAME, Score, ScoreCache


class Work:
    """Counts, by hooks, the tokens that go through the backbone and the rows that the LM head projects."""

    def __init__(self, trainer, monkeypatch):
        self.scored, self.trained, self.forwards, self.head_rows = 0, 0, 0, 0
        model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        model.model.register_forward_hook(self._backbone, with_kwargs=True)
        original = trl_head._ChunkedLogProbFunction.apply

        def apply(hidden, *args):
            self.head_rows += len(hidden)
            return original(hidden, *args)

        monkeypatch.setattr(trl_head._ChunkedLogProbFunction, "apply", apply)

    def _backbone(self, _module, args, kwargs, _output):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        tokens = int(ids.numel() if mask is None else mask.sum())
        if torch.is_grad_enabled():
            self.trained += tokens
        else:
            self.forwards += 1
            self.scored += tokens


@pytest.mark.parametrize("options", [{}, PADDING_FREE, PACKED, {"token_pruning": "drop"}], ids=str)
def test_the_work_is_one_forward_over_the_pool_and_training_on_the_survivors(
    tmp_path, tokenizer, prompt_completion, monkeypatch, options
):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, dropout=0.0, budget="25x50", max_steps=1, **options)
    work, seen = Work(trainer, monkeypatch), Recorder().attach(trainer)
    trainer.train()
    rows = [row for batch in trainer.get_train_dataloader() for row in batch.examples]
    drawn = rows[:16]  # 4 micro-batches of 4 rows; the loader's order is that of the run
    if "packing" not in options:
        assert work.scored == sum(len(row["input_ids"]) for row in drawn)
        assert trainer.summary()["scored"] == 16
    survivors = seen.batches[0]
    if "attention_mask" in survivors[0]:
        assert work.trained == sum(int(batch["attention_mask"].sum()) for batch in survivors)
    else:
        assert work.trained == sum(batch["input_ids"].numel() for batch in survivors)
    tokens = trainer.summary()["answer_tokens"]
    # Labelled positions alone, and no forward for the tokens of stage 2.
    assert work.head_rows == tokens["candidates"] + tokens["kept"]


def test_the_lean_head_is_trls_in_values_and_gradients():
    ids = torch.randint(4, 45, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :9] = -100
    labels[2] = -100
    results = []
    for lean in (False, True):
        model = tiny_llama()
        trl_head.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if lean:
            with lean_lm_head(torch.device("cpu")):
                output = model(ids, labels=labels, fused_lm_head=True)
                output.log_probs.sum().backward()
        else:
            output = model(ids, labels=labels, fused_lm_head=True)
            output.log_probs.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((output.log_probs, output.entropy, output.label_mask, gradients))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_lean_head_leaves_trls_as_it_was():
    before = trl_head._use_triton, trl_head._CHUNKED_LOGPROB_CHUNK_SIZE
    with pytest.raises(RuntimeError), lean_lm_head(torch.device("cpu")):
        raise RuntimeError
    assert (trl_head._use_triton, trl_head._CHUNKED_LOGPROB_CHUNK_SIZE) == before
    with lean_lm_head(torch.device("cuda")):
        assert trl_head._use_triton is before[0]


# Survivors


@pytest.mark.parametrize("scope", ["process", "micro_batch"])
def test_small_micro_batches_give_the_same_gradient(tmp_path, tokenizer, prompt_completion, scope):
    runs = []
    for plan in ("full", "small"):
        trainer = make_trainer(
            tmp_path, tokenizer, prompt_completion, dropout=0.0, budget="50x50", max_steps=1,
            selection_scope=scope, micro_batches=plan,
        )  # fmt: skip
        seen = Recorder().attach(trainer)
        trainer.train()
        runs.append((trainer, seen))
    (full, seen_full), (small, seen_small) = runs
    assert [len(batch["labels"]) for batch in seen_full.batches[0]] == [4, 4]
    assert [len(batch["labels"]) for batch in seen_small.batches[0]] == [2, 2, 2, 2]
    for name, expected in seen_full.gradients[0].items():
        torch.testing.assert_close(seen_small.gradients[0][name], expected, rtol=1e-5, atol=2e-6, msg=name)
    assert losses(small)[0] == pytest.approx(losses(full)[0], rel=1e-5)


def test_without_checkpointing_there_is_nothing_to_split_for(tmp_path, tokenizer, prompt_completion):
    counts = []
    for options in ({}, {"survivor_checkpointing": False}):
        trainer = make_trainer(
            tmp_path, tokenizer, prompt_completion, budget="50x50", max_steps=1, gradient_checkpointing=False, **options
        )
        trainer.train()
        counts.append(trainer._num_micro_batches)
    assert counts == [2, 2]


def test_micro_batches_follow_the_batch_size_that_was_found(tmp_path, tokenizer, prompt_completion):
    """With `auto_find_batch_size`, micro-batches of at most three rows fit, and the search stops at three."""
    trainer = make_trainer(
        tmp_path, tokenizer, prompt_completion, budget="90x50", max_steps=1, auto_find_batch_size=True
    )
    original, rows = trainer.training_step, []

    def training_step(model, inputs, *args):
        rows.append(len(inputs["input_ids"]))
        if rows[-1] > 3:
            raise RuntimeError("CUDA out of memory.")
        return original(model, inputs, *args)

    trainer.training_step = training_step
    trainer.train()
    assert trainer._train_batch_size == max(rows[1:]) == 3


def test_scores_of_an_attempt_that_did_not_fit_are_forgotten(tmp_path, tokenizer, prompt_completion):
    """`auto_find_batch_size` begins again at step 0: scores of its steps would seem to come from later ones."""
    trainer = make_trainer(
        tmp_path, tokenizer, prompt_completion, budget="50x50", max_steps=3, auto_find_batch_size=True,
        score_reuse_steps=2,
    )  # fmt: skip
    original, failed = trainer.training_step, []

    def training_step(model, inputs, *args):
        step = trainer.state.global_step
        assert all(score.step <= step for score in trainer.scorer.cache.scores.values())
        if step == 2 and not failed:
            failed.append(step)
            raise RuntimeError("CUDA out of memory.")
        return original(model, inputs, *args)

    trainer.training_step = training_step
    trainer.train()
    assert failed
    assert trainer.state.global_step == 3


def test_checkpointing_is_off_only_where_it_was_on():
    model = tiny_llama()
    model.gradient_checkpointing_enable({"every_n_layers": 2})
    before = [module.gradient_checkpointing for module in model.model.layers]
    assert any(before)
    with without_checkpointing(model):
        assert not any(module.gradient_checkpointing for module in model.model.layers)
    assert [module.gradient_checkpointing for module in model.model.layers] == before


# Amortised scoring


def score(tokens: int = 2, step: int = 0, epoch: int = 0) -> Score:
    return Score(np.zeros(tokens, np.float32), np.zeros(tokens, np.float32), step, epoch)


def test_a_score_is_used_until_it_expires():
    by_epochs, by_steps = ScoreCache(2, None), ScoreCache(None, 10)
    for cache in (by_epochs, by_steps):
        cache.add(5, score(step=7, epoch=1))
    samples, order = [(5, 2)], [0]
    for by_epochs.epoch, now in ((1, []), (2, []), (3, [0])):
        assert by_epochs.plan(samples, order, 1, 99)[0] == now
    assert [by_steps.plan(samples, order, 1, step)[0] for step in (7, 16, 17)] == [[], [], [0]]


def test_those_without_a_score_come_first_then_the_oldest():
    cache = ScoreCache(1, None)
    for sample_id, step in ((1, 30), (2, 10), (3, 20)):
        cache.add(sample_id, score(step=step))
    cache.epoch = 1
    samples = [(1, 2), (2, 2), (3, 2), (4, 2), (5, 2)]
    now, used = cache.plan(samples, [4, 3, 2, 1, 0], 3, 40)
    assert now == [4, 3, 1]
    assert sorted(used) == [0, 2]  # too old, and used all the same
    now, used = cache.plan(samples, [0, 1, 2, 3, 4], 1, 40)
    assert now == [3]
    assert sorted(used) == [0, 1, 2]  # sample 5 has no score


def test_a_score_of_other_tokens_is_none():
    cache = ScoreCache(9, None)
    cache.add(1, score(tokens=3))
    assert cache.plan([(1, 2)], [0], 1, 0) == ([0], {})


def test_scores_are_saved_and_loaded(tmp_path):
    cache = ScoreCache(2, None)
    assert not cache.load(tmp_path)
    for values in ([0.5, 1.5], [], [2.5]):
        array = np.array(values, dtype=np.float32)
        cache.add(2**62 + len(values), Score(array, array + 1, len(values), 3))
    cache.save(tmp_path)
    again = ScoreCache(2, None)
    assert again.load(tmp_path)
    assert again.scores.keys() == cache.scores.keys()
    for key, expected in cache.scores.items():
        found = again.scores[key]
        assert (found.step, found.epoch) == (expected.step, expected.epoch)
        np.testing.assert_array_equal(found.nll, expected.nll)
        np.testing.assert_array_equal(found.entropy, expected.entropy)
    ScoreCache(1, None).save(tmp_path)
    assert again.load(tmp_path)
    assert again.scores == {}


def test_reused_scores_cost_no_forward_and_are_counted(tmp_path, tokenizer, prompt_completion, monkeypatch):
    trainer = make_trainer(
        tmp_path, tokenizer, prompt_completion, dropout=0.0, budget="25x50", num_train_epochs=3, score_reuse_epochs=2
    )
    work = Work(trainer, monkeypatch)
    per_step = []
    original = trainer.get_batch_samples

    def get_batch_samples(*args):
        before = work.forwards
        result = original(*args)
        per_step.append(work.forwards - before)
        return result

    trainer.get_batch_samples = get_batch_samples
    trainer.train()
    steps = trainer.state.global_step // 3
    assert all(per_step[:steps])
    assert not any(per_step[steps : 2 * steps])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["qtuning/stale_scores"] for entry in logs[: 2 * steps]] == [0, 0, 0, 16, 16, 8]
    assert [entry["qtuning/kept_samples"] for entry in logs] == [4, 4, 2] * 3
    # Whole survivors of the second epoch were renewed by their training forward: these have not expired in the third.
    third = [entry["qtuning/stale_scores"] for entry in logs[2 * steps :]]
    assert 0 < sum(third) < 40
    summary = trainer.summary()
    assert summary["scored"] + summary["stale_scores"] == summary["candidates"] == 120
    assert summary["stale_scores"] == 40 + sum(third)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_renewed_score_is_that_of_a_scoring_forward(tmp_path, tokenizer, prompt_completion, packing):
    options = {"budget": "50x50", "max_steps": 1, "score_reuse_steps": 100, "learning_rate": 0.0}
    if packing:
        options |= {"packing": True, "max_length": 48}
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, **options)
    trainer.train()
    cache = trainer.scorer.cache
    before = dict(cache.scores)
    drawn = {doc.sample_id: doc for row in trainer.train_dataset for doc in split_documents(row)}
    documents = [drawn[key] for key in list(before)[:4]]
    rows = pack_rows(documents, 48) if packing else [Row([document]) for document in documents]
    batch = trainer.data_collator([row.as_example() for row in rows])
    survivors = [document for row in rows for document in row.samples]
    with trainer.scorer.renewed_scores(trainer.model, survivors, trainer.state):
        trainer.model(**batch, fused_lm_head=True)
    for document in documents:
        key = document.sample_id
        assert cache.scores[key] is not before[key]
        np.testing.assert_allclose(cache.scores[key].nll, before[key].nll, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(cache.scores[key].entropy, before[key].entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", ["dropout", "neftune", "proxy"])
def test_only_the_model_that_scores_renews_scores_and_without_noise(
    tmp_path, tokenizer, prompt_completion, proxies, noise
):
    options = {"dropout": {"dropout": 0.1}, "neftune": {"neftune_noise_alpha": 5.0}, "proxy": {}}[noise]
    if noise == "proxy":
        options = {"scoring_model": proxies["differs"]}
    options |= {"budget": "50x50", "max_steps": 1, "score_reuse_steps": 9, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, **options)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)  # zero at first, so that dropout would change nothing
    trainer.train()
    after_training = dict(trainer.scorer.cache.scores)
    trainer.scorer.cache.scores.clear()
    documents = [document for row in trainer.train_dataset for document in split_documents(row)]
    again = [document for document in documents if document.sample_id in after_training]
    trainer.scorer.score(trainer.model, [again], 64, trainer.state)
    for key, score in trainer.scorer.cache.scores.items():
        np.testing.assert_allclose(after_training[key].nll, score.nll, rtol=1e-4, atol=1e-5)


def test_epochs_of_a_stream_count_like_those_of_a_data_set(tmp_path, tokenizer):
    rows = Dataset.from_list(prompt_completion_rows(48))
    counts = []
    for dataset in (rows, rows.to_iterable_dataset()):
        trainer = make_trainer(
            tmp_path, tokenizer, dataset, budget="25x50", max_steps=9, score_reuse_epochs=1,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        counts.append([entry["qtuning/scored_samples"] for entry in logs])
        assert {entry["qtuning/stale_share"] for entry in logs} == {0.0}
    assert counts == [[16.0] * 9] * 2


@pytest.mark.parametrize("options", [{"score_reuse_epochs": 2}, {"score_reuse_steps": 4, "scored_share": 0.5}], ids=str)
def test_a_run_with_cheap_scores_resumes_bit_equal(tmp_path, tokenizer, prompt_completion, options):
    options = {"budget": "25x50", "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4, **options}
    whole = make_trainer(tmp_path, tokenizer, prompt_completion, dropout=0.1, **options)
    whole.train()
    assert (tmp_path / "checkpoint-4" / FILE_NAME).is_file()
    resumed = make_trainer(tmp_path, tokenizer, prompt_completion, dropout=0.1, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert resumed.summary()["stale_scores"] == whole.summary()["stale_scores"] > 0


# Sub-pool scoring and a proxy


def test_a_share_of_the_pool_is_scored_and_as_many_are_kept(tmp_path, tokenizer, monkeypatch):
    dataset = Dataset.from_list(prompt_completion_rows(37))
    trainer = make_trainer(
        tmp_path, tokenizer, dataset, dropout=0.0, budget="25x50", num_train_epochs=1, scored_share=0.5
    )
    torch.manual_seed(3)
    state = torch.get_rng_state()
    pools = []
    original = trainer._prune_pool

    def prune_pool(*args):
        before = torch.get_rng_state()
        result = original(*args)
        assert torch.equal(before, torch.get_rng_state())
        pools.append(trainer.last_pool)
        return result

    trainer._prune_pool = prune_pool
    trainer.train()
    assert not torch.equal(state, torch.get_rng_state())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["qtuning/pool_samples"] for entry in logs] == [16, 16, 5]
    assert [entry["qtuning/scored_samples"] for entry in logs] == [8, 8, 3]
    assert [entry["qtuning/kept_samples"] for entry in logs] == [4, 4, 1]
    assert [len(pool["kept"]) for pool in pools] == [8, 8, 3]


@pytest.fixture(scope="module")
def proxies(tmp_path_factory, tokenizer_dir) -> dict[str, str]:
    """The very model that is trained, one with other weights, and one whose tokenizer is another."""
    folder = tmp_path_factory.mktemp("proxies")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    for name in ("same", "differs", "other"):
        tiny_llama(7 if name == "differs" else 0).save_pretrained(folder / name)
        if name == "other":
            tokenizer.add_tokens(["new"])
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("same", "differs", "other")}


def test_a_proxy_that_is_the_model_itself_selects_the_same(
    tmp_path, tokenizer, prompt_completion, proxies, monkeypatch
):
    runs = []
    for options in ({}, {"scoring_model": proxies["same"]}):
        trainer = make_trainer(
            tmp_path, tokenizer, prompt_completion, dropout=0.0, budget="25x50", max_steps=1, **options
        )
        work = Work(trainer, monkeypatch)
        trainer.train()
        runs.append((trainer.last_pool, work.forwards))
        monkeypatch.undo()
    (exact, forwards), (proxy, no_forwards) = runs
    assert proxy["kept"] == exact["kept"]
    np.testing.assert_allclose(proxy["perplexity"], exact["perplexity"], rtol=1e-5)
    assert (forwards > 0, no_forwards) == (True, 0)


def test_a_proxy_computes_in_the_precision_of_training(tmp_path, tokenizer, prompt_completion, proxies):
    options = {"budget": "25x50", "max_steps": 1, "bf16": True, "scoring_model": proxies["same"]}
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, **options)
    types = {}
    for name, model in (("trained", trainer.model), ("proxy", trainer.scorer.proxy)):
        model.model.layers[0].mlp.up_proj.register_forward_hook(
            lambda _module, _inputs, output, name=name: types.update({name: output.dtype})
        )
    trainer.train()
    assert types == {"trained": torch.bfloat16, "proxy": torch.bfloat16}
    assert trainer.scorer.proxy.config._attn_implementation == trainer.model.config._attn_implementation


def test_a_proxy_must_know_the_same_tokens_and_exist(tmp_path, tokenizer, prompt_completion, proxies):
    with pytest.raises(ValueError, match=r"`scoring_model` is .* another vocabulary than the model that is trained"):
        make_trainer(tmp_path, tokenizer, prompt_completion, scoring_model=proxies["other"])
    with pytest.raises(ValueError, match="`scoring_model` is '/nowhere', which cannot be loaded"):
        make_trainer(tmp_path, tokenizer, prompt_completion, scoring_model="/nowhere")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scored_share": 0.1}, "`scored_share` is 0.1 and `sample_ratio` is 0.125: give a share from `sample_ratio`"),
        ({"scored_share": 1.5}, "`scored_share` is 1.5"),
        ({"score_reuse_epochs": 0}, "`score_reuse_epochs` is 0: give a whole number of at least 1"),
        ({"score_reuse_epochs": 2, "score_reuse_steps": 2}, "`score_reuse_epochs` is 2 and `score_reuse_steps` is 2"),
        ({"micro_batches": "tiny"}, "`micro_batches` is 'tiny': choose one of 'full', 'small'"),
    ],
)
def test_bad_values_are_refused(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        QTuningSFTConfig(str(tmp_path), **{"use_cpu": COMMON["use_cpu"], "bf16": False, **options})


def test_out_of_memory_while_scoring_names_the_option(tmp_path, tokenizer, prompt_completion, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, budget="25x50", scoring_batch_tokens=80)
    monkeypatch.setattr(trainer.scorer, "forward", lambda model, samples: torch.empty(2**60))
    sentence = "Out of memory while scoring 80 tokens at once: set `scoring_batch_tokens` to less, such as 40, or lower"
    with pytest.raises(MemoryError, match=sentence) as raised:
        trainer.train()
    assert "can't allocate memory" in str(raised.value.__cause__)


def test_scoring_batches_follow_what_is_trained_at_once(tmp_path, tokenizer, prompt_completion):
    lengths = [10] * 16
    full = make_trainer(tmp_path, tokenizer, prompt_completion, budget="25x50")
    small = make_trainer(tmp_path, tokenizer, prompt_completion, budget="25x50", micro_batches="small")
    own = make_trainer(tmp_path, tokenizer, prompt_completion, budget="25x50", scoring_batch_tokens=77)
    assert full.scorer.batch_tokens(lengths, 40, 4) == 3 * 40  # four survivors, one micro-batch
    assert small.scorer.batch_tokens(lengths, 40, 4) == 3 * 10
    assert own.scorer.batch_tokens(lengths, 40, 4) == 77
    assert math.isclose(full.args.sample_ratio, 0.25)
