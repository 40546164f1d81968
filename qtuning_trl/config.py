"""`QTuningSFTConfig`: TRL's `SFTConfig` plus the options of Q-Tuning."""

import math
from dataclasses import dataclass, field

from trl import SFTConfig

from . import pruners
from .values import parse_budget, refuse_bad_values

TOKEN_PRUNING = ("mask", "drop", "loss")
SELECTION_SCOPES = ("process", "all_processes", "micro_batch")
MICRO_BATCHES = ("full", "small")
SURVIVOR_CHECKPOINTING = ("true", "auto", "false")
TOKEN_BUDGETS = ("answer", "pool")
BISECTIONS = ("budget", "full")


@dataclass
class QTuningSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`QTuningSFTTrainer`].

    It holds every option of TRL's [`~trl.SFTConfig`], and the options of Q-Tuning below. The help text of each option
    is its `metadata["help"]` (`qtuning sft --help` prints them).
    """

    # Parameters that control the budget
    budget: str | None = field(
        default=None,
        metadata={
            "help": "Samples x tokens to keep, in per cent, e.g. `'12.5x50'`. A shorthand that sets `sample_ratio` and "
            "`token_ratio`; give either the budget or the ratios."
        },
    )
    sample_ratio: float = field(
        default=0.125,
        metadata={
            "help": "Share of the candidate samples to train on (r_sample in the paper), in (0, 1]. Exactly "
            "`floor(sample_ratio * pool)` samples survive, and at least one. 1.0 keeps every sample. 1.0 with the "
            "`sample_pruner` 'none'."
        },
    )
    token_ratio: float = field(
        default=0.5,
        metadata={
            "help": "Share of the answer tokens to keep in the surviving samples of quadrant Q2 (r_token in the "
            "paper), in (0, 1]. Other token pruners than 'q_tuning' keep this share in all surviving samples. 1.0 "
            "keeps every token. 1.0 with the `token_pruner` 'none'."
        },
    )
    token_budget: str = field(
        default="answer",
        metadata={
            "help": "Of what `token_ratio` is a share: `'answer'` (eq. 7: of each answer whose tokens are pruned; what "
            "stays whole comes on top, so that 25x50 trains on about a fifth of the answer tokens), or `'pool'`: "
            "`floor(sample_ratio * token_ratio * answer tokens of the pool)` tokens stay of all candidates that are "
            "compared. The tokens to be pruned are ranked together; what stays whole is never touched, so where that "
            "alone is more, more stays.",
            "choices": list(TOKEN_BUDGETS),
        },
    )

    # Parameters that choose who prunes
    sample_pruner: str = field(
        default="q_tuning",
        metadata={
            "help": "Which samples survive: `'q_tuning'`, or a rival at the same budget: `'random'`, `'longest'`, "
            "`'entropy_high'`, `'entropy_middle'`, `'entropy_low'`, `'perplexity_high'`, `'perplexity_middle'`, "
            "`'perplexity_low'`, `'excess'`, `'infobatch'`, `'column'` (a selection made elsewhere, see "
            "`score_column`), `'none'` (all); as the authors of Q-Tuning coded them `'q_tuning_code'`, "
            "`'longest_code'`, `'entropy_code'`; or a registered one of your own."
        },
    )
    token_pruner: str = field(
        default="q_tuning",
        metadata={
            "help": "Which answer tokens of the survivors stay: `'q_tuning'`, as its authors coded it "
            "`'q_tuning_code'`, or a rival: `'random'`, `'easiest'`, `'hardest'`, `'uncertain'`, "
            "`'importance'`, `'rho1'`, `'token_cleaning'` (both need `reference_model`), `'fastv'`, "
            "`'sparsevlm'` (both need eager attention), `'none'` (all), or a registered one of your own. Q-Tuning's "
            "samples with Q-Tuning's tokens prune Q2 alone, as in the paper; other tokens prune all survivors."
        },
    )
    score_column: str | None = field(
        default=None,
        metadata={
            "help": "Dataset column for the `sample_pruner` 'column': numbers, of which the highest in each pool are "
            "kept, to the budget; or booleans, which mark exactly what is kept."
        },
    )
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "Name or path of a model with the same tokenizer, fine-tuned on data you trust, for the token "
            "pruners 'rho1' and 'token_cleaning'."
        },
    )
    infobatch_annealing: float = field(
        default=0.0,
        metadata={
            "help": "Share of the run, at its end, in which the `sample_pruner` 'infobatch' keeps everything, in "
            "[0, 1). The paper's is 0.125. It comes on top of the budget, so it is 0 unless asked for."
        },
    )

    # Parameters that control the method
    bisection: str = field(
        default="budget",
        metadata={
            "help": "How Algorithm 1's bisection ends: `'budget'` stops as soon as Q2 and Q4 hold `sample_ratio` of "
            "the pool to within 0.01, so that less is filled up from outside them; `'full'` takes all ten steps.",
            "choices": list(BISECTIONS),
        },
    )
    neighbor_weight: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the neighbours in the token score (lambda in the paper's eq. 7), in [0, 1]. 0.0 scores "
            "a token by its own perplexity only."
        },
    )
    token_pruning: str = field(
        default="mask",
        metadata={
            "help": "What happens to a pruned answer token: `'mask'` takes it out of the loss and leaves it in the "
            "context, `'drop'` takes it out of the sequence, which also saves its compute. `'loss'` masks too, by the "
            "scores of the training forward itself, so that none is needed for scoring: for a `sample_pruner` that "
            "needs no scores, with `'importance'`, `'hardest'`, `'easiest'` or `'uncertain'` tokens. With "
            "`token_budget` 'pool' tokens are then ranked within a micro-batch.",
            "choices": list(TOKEN_PRUNING),
        },
    )
    protect_special_tokens: bool = field(
        default=True,
        metadata={
            "help": "Whether special tokens in the answer (end of sequence, end of turn) are never pruned, so that the "
            "model does not unlearn to stop. They count towards the token budget."
        },
    )

    # Parameters that control the pool of candidates
    pool_factor: int = field(
        default=1,
        metadata={
            "help": "Number of candidates drawn per slot of the optimizer step. With 1, a step draws the samples that "
            "`SFTTrainer` would train on and trains on fewer. With 8 and `sample_ratio=0.125` it draws eight times as "
            "many and trains on a full step. `pool_factor * sample_ratio` must not exceed 1."
        },
    )
    selection_scope: str = field(
        default="process",
        metadata={
            "help": "Candidates compared with each other: `'process'` (those of the whole optimizer step on each "
            "process), `'all_processes'` (those of the whole optimizer step on all processes), or `'micro_batch'` "
            "(those of one per-device micro-batch, as in the paper).",
            "choices": list(SELECTION_SCOPES),
        },
    )
    scoring_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens, padding included, in one batch of the scoring forward. If `None`, as many as need no more "
            "memory than a micro-batch of survivors, which is counted on the model (on a CPU three times as many "
            "tokens, 512 at most), and at least one row."
        },
    )

    # Parameters that make scoring cheaper than exact, which is the default
    scored_share: float = field(
        default=1.0,
        metadata={
            "help": "Share of the pool that is scored, in (0, 1], drawn at random. As many samples are kept as of the "
            "whole pool, but chosen among those scored. Must be at least `sample_ratio`. With reused scores it is the "
            "share that is scored anew at most, those first whose scores are oldest."
        },
    )
    score_reuse_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Epochs for which a sample's score is used again before the sample is scored anew. The number of "
            "epochs of the run scores in the first one only, which makes the selection static. If `None`, a sample is "
            "scored whenever it is drawn."
        },
    )
    score_reuse_steps: int | None = field(
        default=None,
        metadata={"help": "As `score_reuse_epochs`, in optimizer steps. Give one of the two."},
    )
    scoring_model: str | None = field(
        default=None,
        metadata={
            "help": "Name or path of a smaller model with the same tokenizer, which scores for the model that is "
            "trained (e.g. SmolLM2-135M for SmolLM2-1.7B). It is not trained, which makes the selection static."
        },
    )

    # Parameters that control how the survivors are trained on
    micro_batches: str = field(
        default="full",
        metadata={
            "help": "How the survivors of an optimizer step are split: `'full'` micro-batches, as few as they need "
            "(faster), or `'small'` ones, as many as the step has without pruning (lower peak memory).",
            "choices": list(MICRO_BATCHES),
        },
    )
    survivor_checkpointing: str = field(
        default="true",
        metadata={
            "help": "Whether `gradient_checkpointing` holds for the survivors: `'true'`; `'false'`; or `'auto'`, which "
            "trains them without it, as many at a time as the memory that is free allows (on a GPU from the second "
            "step on), and with it only where a row is too long. After an out-of-memory error the micro-batch is "
            "trained again with it. The gradients are the same.",
            "choices": list(SURVIVOR_CHECKPOINTING),
        },
    )
    survivor_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens, padding included, of a micro-batch of survivors without checkpointing, in place of what "
            "`survivor_checkpointing` 'auto' finds. `qtuning plan --fit` says how many fit a card."
        },
    )

    # Parameters that control the records
    record: bool = field(
        default=True,
        metadata={
            "help": "Whether to append what each step decides about each sample to Parquet files in "
            "`<output_dir>/_qtuning_record`, which `qtuning report` and `load_record` read. Where the pool is not "
            "scored, the counts and seconds of each step. It holds the samples' texts and is not pushed to the Hub."
        },
    )
    record_tokens: float = field(
        default=1.0,
        metadata={
            "help": "Share of the samples whose kept-token masks are recorded, in [0, 1]; the same samples at every "
            "step. A mask costs about a bit per answer token, and only where tokens are pruned."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={
            "help": "Dataset column (e.g. `'source'`) by whose values the run's summary counts candidates and "
            "survivors."
        },
    )

    def __post_init__(self):
        refuse_bad_values(vars(self))  # before the host looks at the device: what is wrong here is wrong everywhere
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16" in str(error) and "use_cpu" in str(error):
                raise ValueError(
                    "`bf16` is true, as TRL has it unless told otherwise, and there is no GPU that can: add "
                    "`--bf16 false`, or to train on the CPU `--use_cpu`."
                ) from None
            raise
        if self.fp16 and self.device.type == "cpu":
            raise ValueError(
                "`fp16` is true and the run is on a CPU, which cannot: leave it out, or set `bf16` instead."
            )
        if self.budget is not None:
            self._apply_budget(self.budget)
        if self.sample_pruner == "none":
            self.sample_ratio = 1.0
        if self.token_pruner == "none":
            self.token_ratio = 1.0
        if isinstance(self.survivor_checkpointing, bool):
            self.survivor_checkpointing = str(self.survivor_checkpointing).lower()
        for name, choices in (
            ("token_budget", TOKEN_BUDGETS),
            ("bisection", BISECTIONS),
            ("token_pruning", TOKEN_PRUNING),
            ("selection_scope", SELECTION_SCOPES),
            ("micro_batches", MICRO_BATCHES),
            ("survivor_checkpointing", SURVIVOR_CHECKPOINTING),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` is {value!r}: choose one of {', '.join(map(repr, choices))}.")
        if self.pool_factor * self.sample_ratio > 1.0:
            raise ValueError(
                f"`pool_factor` is {self.pool_factor} and `sample_ratio` is {self.sample_ratio}: their product must "
                f"not exceed 1, so that the survivors fit into one optimizer step; set `pool_factor` to "
                f"{math.floor(1.0 / self.sample_ratio)} or less."
            )
        if self.survivor_batch_tokens is not None and self.survivor_checkpointing != "auto":
            raise ValueError(
                f"`survivor_batch_tokens` is {self.survivor_batch_tokens} and `survivor_checkpointing` is "
                f"{self.survivor_checkpointing!r}: set `survivor_checkpointing` to 'auto', or leave it out."
            )
        self._check_pruners()
        self._check_loss_pruning()
        self._check_cheaper_scoring()

    def _check_loss_pruning(self) -> None:
        if not self.prunes_in_loss:
            return
        if {*self.token_needs} - {"weights"} != {"scores"}:
            raise ValueError(
                f"`token_pruning` is 'loss' and `token_pruner` is {self.token_pruner!r}: set `token_pruning` to "
                "'mask', or choose 'importance', 'hardest', 'easiest' or 'uncertain' tokens, which the training "
                "forward can tell."
            )
        if "scores" in self.sample_needs:
            raise ValueError(
                f"`token_pruning` is 'loss' and `sample_pruner` is {self.sample_pruner!r}: set `token_pruning` to "
                "'mask', since the scores of the samples hold those of their tokens, or choose a `sample_pruner` that "
                "needs no scores, such as 'random' or 'none'."
            )

    def _check_pruners(self) -> None:
        needs = {*self.sample_needs, *self.token_needs}
        if "column" in needs and self.score_column is None:
            raise ValueError(
                f"`sample_pruner` is {self.sample_pruner!r} and `score_column` is not given: name the dataset column "
                "that holds the scores or the marks."
            )
        if "reference" in needs and self.reference_model is None:
            raise ValueError(
                f"`token_pruner` is {self.token_pruner!r} and `reference_model` is not given: name a model of the same "
                "family, fine-tuned on data you trust."
            )
        if "sequence_entropy" in needs and self.reuses_scores:
            raise ValueError(
                f"`sample_pruner` is {self.sample_pruner!r} and scores are reused: leave out `score_reuse_epochs` and "
                "`score_reuse_steps`, since the entropy at prompt positions is not kept with a score."
            )
        if self.pool_factor > 1 and self.sample_pruner == "q_tuning_code":
            raise ValueError(
                f"`sample_pruner` is 'q_tuning_code' and `pool_factor` is {self.pool_factor}: set `pool_factor` to 1, "
                "since it may keep more than `sample_ratio`, which would not fit into one optimizer step."
            )
        for what, of_it in (("sample", self.sample_needs), ("token", self.token_needs)):
            if "weights" in of_it and self.loss_type != "nll":
                raise ValueError(
                    f"`{what}_pruner` is {getattr(self, f'{what}_pruner')!r}, which weights the losses of its {what}s, "
                    f"and `loss_type` is {self.loss_type!r}: set `loss_type` to 'nll'."
                )
        if {*self.sample_needs} & {"column", "weights"} and self.packing:
            raise ValueError(
                f"`sample_pruner` is {self.sample_pruner!r} and `packing` is on: set `packing` to false, or use "
                "`padding_free`, since a packed row keeps nothing but the tokens of its samples."
            )
        if self.pool_factor > 1 and self.sample_pruner == "infobatch" and self.infobatch_annealing > 0:
            raise ValueError(
                f"`infobatch_annealing` is {self.infobatch_annealing} and `pool_factor` is {self.pool_factor}: set one "
                "of them to its default, since the whole pool does not fit into one optimizer step."
            )

    def _check_cheaper_scoring(self) -> None:
        lowest = self.sample_ratio if "scores" in self.sample_needs else 0.0
        if not lowest <= self.scored_share <= 1.0:
            raise ValueError(
                f"`scored_share` is {self.scored_share} and `sample_ratio` is {self.sample_ratio}: give a share from "
                "`sample_ratio` to 1, since only scored samples can be kept."
            )
        if self.score_reuse_epochs is not None and self.score_reuse_steps is not None:
            raise ValueError(
                f"`score_reuse_epochs` is {self.score_reuse_epochs} and `score_reuse_steps` is "
                f"{self.score_reuse_steps}: give only one of the two."
            )

    def _apply_budget(self, budget: str) -> None:
        fields = type(self).__dataclass_fields__
        for name, ratio in zip(("sample_ratio", "token_ratio"), parse_budget(budget), strict=True):
            if getattr(self, name.replace("ratio", "pruner")) == "none":
                continue
            given = getattr(self, name)
            if given not in (ratio, fields[name].default):
                raise ValueError(
                    f"`budget` is {budget!r} and `{name}` is {given}: they disagree, so give only one of the two."
                )
            setattr(self, name, ratio)

    @property
    def reuses_scores(self) -> bool:
        """Whether a sample's score may be used in several steps."""
        return self.score_reuse_epochs is not None or self.score_reuse_steps is not None

    @property
    def sample_needs(self) -> tuple[str, ...]:
        """What the sample pruner needs of the run."""
        return pruners.sample_pruner(self.sample_pruner).needs

    @property
    def token_needs(self) -> tuple[str, ...]:
        """What the token pruner needs of the run: nothing, if the budget keeps every token."""
        needs = pruners.token_pruner(self.token_pruner).needs
        return needs if self.token_ratio < 1.0 else ()

    @property
    def prunes_in_loss(self) -> bool:
        """Whether the training forward chooses among the answer tokens."""
        return self.token_pruning == "loss" and self.token_ratio < 1.0

    @property
    def compares_processes(self) -> bool:
        """Whether the candidates of several processes are compared with each other."""
        return self.selection_scope == "all_processes" and self.world_size > 1

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is pruned (100 x 100, and no column that marks), so the run is the plain `SFTTrainer`'s."""
        return self.sample_ratio == 1.0 and self.token_ratio == 1.0 and "column" not in self.sample_needs
