"""A recipe's plan: peak memory by part, the cards it fits, time against plain SFT, steps and tokens."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

from transformers import PreTrainedConfig
from trl import ModelConfig

from ..config import QTuningSFTConfig
from ..host.ledger import HEAD, Peak
from ..method import budget_size
from ..step.memory import MOST_SCORED
from .counting import Batch, Counted, CountedModel
from .lengths import Lengths
from .model import layer_kinds
from .timing import Budget, Cost, Costs, StepShape, step_time

GIB = 2**30
CARDS = (6, 8, 10, 12, 16, 24, 48, 80)
# Not counted: what CUDA itself and its libraries take, and what fragmentation leaves unusable.
CUDA_CONTEXT = 0.6 * GIB
FRAGMENTATION = 0.10
COUNTED_OPTIMIZERS = ("adamw_torch", "sgd", "adagrad", "rmsprop")
COUNTED_TIME = "Time is in operations, on rows as long as these; half of the survivors are taken to have tokens pruned."
NOT_COUNTED = (
    f"Not counted: the CUDA context ({CUDA_CONTEXT / GIB:g} GiB are added), fragmentation ({FRAGMENTATION:.0%} are "
    "added; without them it is `tight`), other programs on the card, and evaluation."
)


@dataclass(frozen=True)
class Setting:
    """
    What may be set without changing what is learnt.

    Args:
        rows (`int`): `per_device_train_batch_size`.
        accumulation (`int`): `gradient_accumulation_steps`.
        four_bit (`bool`): `load_in_4bit`.
        checkpointing (`bool`): `gradient_checkpointing`.
        survivors (`str`): `survivor_checkpointing`: `'true'`, `'false'` or `'auto'`.
        free_tokens (`int`, *optional*): Survivors' tokens at a time without checkpointing; as the card allows if
            `None`.
        scoring_tokens (`int`, *optional*): `scoring_batch_tokens`.
    """

    rows: int
    accumulation: int
    four_bit: bool
    checkpointing: bool
    survivors: str
    free_tokens: int | None = None
    scoring_tokens: int | None = None


@dataclass(frozen=True)
class Memory:
    """
    Peaks of a run, in bytes.

    Args:
        peaks (`dict`): By phase: `optimizer`, `scoring`, `training` (of survivors), and `plain`, the micro-batch of
            plain SFT as the recipe has it.
        parts (`dict`): What the highest peak of our run consists of.
        head (`int`): The most that the LM head takes by itself, be it at that peak or not.
        free_tokens (`int`): Survivors' tokens at a time that go without checkpointing.
        scoring_tokens (`int`): Tokens scored at once.
    """

    peaks: dict[str, int]
    parts: dict[str, int]
    head: int
    free_tokens: int
    scoring_tokens: int

    @property
    def bytes(self) -> int:
        """The peak of our run."""
        return max(value for name, value in self.peaks.items() if name != "plain")

    @property
    def sets_peak(self) -> str:
        """The phase that sets it."""
        return max((name for name in self.peaks if name != "plain"), key=lambda name: self.peaks[name])

    @property
    def plain_bytes(self) -> int:
        """The peak of plain SFT."""
        return max(self.peaks["plain"], self.peaks["optimizer"])


@dataclass(frozen=True)
class Plan:
    """
    What `qtuning plan` says, and writes as JSON.

    Args:
        model (`str`): Its name.
        setting ([`Setting`]): The settings that memory and time depend on.
        card (`float`, *optional*): GiB of the card that is planned for.
        memory ([`Memory`]): Peaks.
        least (`int`): The peak of the run if `auto` finds no room at all, in bytes: what a card must have.
        verdict (`dict`): Of each card, `fits`, `tight` or `does not fit`.
        time (`dict`): Of a step, as shares of plain SFT's: `scoring`, `training`, `step`.
        run (`dict`): `candidates` and `survivors` of a step; `steps` and `tokens` of the run, if the data is known.
        lengths (`dict`): `mean`, `longest`, quantiles in tokens, and their `source`.
        notes (`list[str]`): What is assumed and not counted.
    """

    model: str
    setting: Setting
    card: float | None
    memory: Memory
    least: int
    verdict: dict[str, str]
    time: dict[str, float]
    run: dict[str, Any]
    lengths: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON takes it, with the two peaks."""
        memory = asdict(self.memory) | {"peak": self.memory.bytes, "sets_peak": self.memory.sets_peak}
        return asdict(self) | {"memory": memory}


def refuse_uncounted_options(training_args: QTuningSFTConfig, model_args: ModelConfig) -> None:
    """Raise a `ValueError` if a run has an optimizer, weights or a distribution that are not counted."""
    if model_args.load_in_8bit:
        raise ValueError("`load_in_8bit` is true: plan with `load_in_4bit` or without both; 8 bits are not counted.")
    optimizer = str(getattr(training_args.optim, "value", training_args.optim))
    if not optimizer.startswith(COUNTED_OPTIMIZERS):
        raise ValueError(
            f"`optim` is {optimizer!r}: plan with 'adamw_torch_fused', whose states are larger "
            "than most, since only PyTorch's own optimizers are counted."
        )
    sharded = [name for name in ("fsdp", "deepspeed") if getattr(training_args, name, None)]
    if sharded:
        refuse_sharded(sharded[0])


def refuse_sharded(option: str) -> NoReturn:
    """Raise the `ValueError` about an option by which several cards share a model."""
    raise ValueError(f"`{option}` is given: plan without it, for one card that holds the whole model.")


def room_of(card: float) -> float:
    """Bytes that a run may count on a card of so many GiB: what the context and fragmentation leave."""
    return (card * GIB - CUDA_CONTEXT) / (1 + FRAGMENTATION)


def largest(measure: Callable[[int], int], most: int, limit: float) -> int:
    """
    The largest number from 1 to `most` whose measure is within `limit`; 0 if none is.

    The measure must not fall. It is all but linear, so where a straight line through two of them says is tried first.
    """
    if measure(most) <= limit:
        return most
    if measure(1) > limit:
        return 0
    low, high = 1, most  # within the limit, and beyond it
    while high - low > 1:
        slope = (measure(high) - measure(low)) / (high - low)
        guess = low + int((limit - measure(low)) / max(slope, 1e-9))
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if measure(guess) <= limit else (low, guess)
    return low


def verdict(peak: float, card: float) -> str:
    """Whether a peak of so many bytes fits a card of so many GiB."""
    if peak <= room_of(card):
        return "fits"
    return "tight" if peak <= card * GIB - CUDA_CONTEXT else "does not fit"


class Planner:
    """
    Plans a recipe in any of its settings.

    Args:
        config (`PreTrainedConfig`): Of the model.
        lengths ([`Lengths`]): Of the rows that the run draws.
        training_args ([`QTuningSFTConfig`]), model_args ([`~trl.ModelConfig`]): What the recipe says.
        processes (`int`): Cards it runs on, each with a model of its own.
        whole (`bool`): Count all layers, not two and three.

    Raises:
        `ValueError`: If the recipe is of a kind that is not counted.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        lengths: Lengths,
        training_args: QTuningSFTConfig,
        model_args: ModelConfig,
        processes: int = 1,
        whole: bool = False,
    ):
        self.args, self.model_args, self.processes, self.whole = training_args, model_args, processes, whole
        self.config, self.lengths = config, lengths
        kinds = layer_kinds(config)
        if len(kinds) > 1 and not whole:
            raise ValueError(
                f"`model_name_or_path` is {model_args.model_name_or_path!r}, whose layers differ in kind "
                f"({', '.join(kinds)}): add `--whole`, which counts every layer and takes longer."
            )
        self.flattened = bool(training_args.padding_free or training_args.packing) or "flash" in str(
            model_args.attn_implementation
        )
        self._counted: dict[bool, CountedModel] = {}

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned."""
        return not self.args.keeps_everything

    @property
    def pool_is_micro_batch(self) -> bool:
        """Whether the candidates of a micro-batch are compared with each other alone."""
        return self.prunes and self.args.selection_scope == "micro_batch"

    @property
    def setting(self) -> Setting:
        """The recipe's own settings."""
        return Setting(
            rows=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            four_bit=bool(self.model_args.load_in_4bit),
            checkpointing=bool(self.args.gradient_checkpointing),
            survivors=self.args.survivor_checkpointing if self.prunes else "true",
            free_tokens=self.args.survivor_batch_tokens,
            scoring_tokens=self.args.scoring_batch_tokens,
        )

    def counted(self, four_bit: bool) -> CountedModel:
        """The model's counts, plain or in 4 bits."""
        if four_bit not in self._counted:
            own = self.model_args
            nested = own.use_bnb_nested_quant or not own.load_in_4bit  # as `--fit` writes it
            model_args = replace(own, load_in_4bit=four_bit, use_bnb_nested_quant=nested)
            try:
                self._counted[four_bit] = CountedModel(self.config, model_args, self.args, self.whole)
                self._counted[four_bit].train(self.batch(1, 64), True)
            except ValueError:
                raise
            except Exception as error:  # a model's own code may do anything with tensors that have no values
                cause = " ".join(str(error).split())[:200] or type(error).__name__
                raise ValueError(
                    f"`model_name_or_path` is {self.model_args.model_name_or_path!r}, which cannot be counted without "
                    f"values ({cause}): measure a few steps of it on the card, with `--max_steps 3`."
                ) from error
        return self._counted[four_bit]

    def batch(self, rows: int, length: int | None = None) -> Batch:
        """Rows of one length, the longest of the data unless one is given, with the data's share of labels."""
        share = float(self.lengths.labelled.sum() / self.lengths.tokens.sum())
        return Batch(rows, length or self.lengths.longest, share, self.flattened)

    def _free(self, setting: Setting, tokens: int) -> Counted:
        """A micro-batch of so many tokens without checkpointing, in the longest rows there are."""
        longest = self.lengths.longest
        rows, length = (1, tokens) if tokens <= longest else (tokens // longest, longest)
        return self.counted(setting.four_bit).train(self.batch(rows, length), False)

    # Memory

    def memory(self, setting: Setting, card: float | None = None) -> Memory:
        """The peaks of the recipe in a setting, on a card of so many GiB; without one, `auto` checkpoints."""
        counted = self.counted(setting.four_bit)
        micro_batch = counted.train(self.batch(setting.rows), setting.checkpointing).peak
        own = self.setting
        plain = self.counted(own.four_bit).train(self.batch(own.rows), own.checkpointing).peak
        optimizer = counted.optimizer_step().peak
        peaks = {"optimizer": optimizer, "training": micro_batch}
        free = scored = 0
        if self.prunes:
            survivors = self._survivors(setting, 1)
            rows = min(setting.rows, survivors)
            if self.args.micro_batches == "small":
                rows = math.ceil(survivors / min(survivors, setting.accumulation * self.args.pool_factor))
            checkpointed = counted.train(self.batch(rows), setting.checkpointing).peak
            scored = setting.scoring_tokens or self._scoring_tokens(setting, checkpointed.bytes)
            free = self._free_tokens(setting, rows, card)
            peaks["training"] = checkpointed
            if free and setting.checkpointing:
                all_free = free >= rows * self.lengths.longest
                peak = self._free(setting, free).peak
                peaks["training"] = peak if all_free or peak.bytes > checkpointed.bytes else checkpointed
            scoring_rows = max(1, scored // self.lengths.longest)
            peaks["scoring"] = counted.score(self.batch(scoring_rows)).peak
        highest = max(peaks.values(), key=lambda peak: peak.bytes)
        phases = {name: peak.bytes for name, peak in peaks.items()} | {"plain": plain.bytes}
        head = max(peak.most[HEAD] for peak in peaks.values())
        return Memory(phases, _named(highest, peaks), head, free, scored)

    def _scoring_tokens(self, setting: Setting, training_peak: int) -> int:
        """Tokens to score at once, in rows of the greatest length, so that scoring stays below training's peak."""
        counted, longest = self.counted(setting.four_bit), self.lengths.longest
        rows = largest(
            lambda rows: counted.score(self.batch(rows)).peak.bytes, max(1, MOST_SCORED // longest), training_peak
        )
        return max(rows, 1) * longest

    def _free_tokens(self, setting: Setting, rows: int, card: float | None) -> int:
        """Tokens at a time of survivors without checkpointing: as asked for, or what fits the card."""
        most = rows * self.lengths.longest
        if setting.survivors == "true" or not setting.checkpointing:
            return 0
        if setting.survivors == "false":
            return most
        if setting.free_tokens is not None:
            return min(setting.free_tokens, most)
        if card is None:
            return 0
        return self.fitting_tokens(setting, most, card)

    def fitting_tokens(self, setting: Setting, most: int, card: float) -> int:
        """The most tokens, up to `most`, that can be trained on at once without checkpointing on a card."""
        room, longest = room_of(card), self.lengths.longest

        def peak(tokens: int) -> int:
            return self._free(setting, tokens).peak.bytes

        rows = largest(lambda rows: peak(rows * longest), most // longest, room)
        step = max(1, longest // 32)
        return rows * longest or step * largest(lambda steps: peak(steps * step), longest // step, room)

    # Time

    def time(self, setting: Setting, memory: Memory, sorted_rows: bool = False) -> dict[str, float]:
        """Time of a step against plain SFT's, in operations, as [`step_time`] says it."""
        counted = self.counted(setting.four_bit)
        batch = self.batch(1)
        costs = Costs(
            Cost.of(counted.score(batch), batch),
            Cost.of(counted.train(batch, True), batch),
            Cost.of(counted.train(batch, False), batch),
        )
        shape = StepShape(
            rows=setting.rows,
            slots=setting.accumulation * self.args.pool_factor,
            checkpointing=setting.checkpointing,
            plain_checkpointing=bool(self.args.gradient_checkpointing),
            plain_rows=self.args.per_device_train_batch_size,
            free_tokens=memory.free_tokens if setting.survivors != "false" else None,
            scoring_tokens=memory.scoring_tokens,
            flattened=self.flattened,
            sorted_rows=sorted_rows,
        )
        pool_scored = "scores" in self.args.sample_needs
        budget = Budget(
            self.args.sample_ratio,
            self.args.token_ratio,
            drop=self.args.token_pruning == "drop",
            scored_share=self.args.scored_share if pool_scored else 0.0,
            survivors_scored="scores" in self.args.token_needs and not pool_scored and not self.args.prunes_in_loss,
        )
        return step_time(self.lengths, shape, budget, costs)

    # The plan

    def plan(self, setting: Setting | None = None, card: float | None = None) -> Plan:
        """The plan of the recipe, in its own settings unless others are given."""
        setting = setting or self.setting
        memory = self.memory(setting, card)
        least = memory.bytes if card is None else self.memory(setting).bytes
        cards = CARDS if card is None else (card,)
        return Plan(
            model=str(self.model_args.model_name_or_path),
            setting=setting,
            card=card,
            memory=memory,
            least=least,
            verdict={f"{size:g}": verdict(least, size) for size in cards},
            time=self.time(setting, memory),
            run=self._run(setting),
            lengths=self._lengths(),
            notes=self._notes(setting, card),
        )

    def _survivors(self, setting: Setting, processes: int) -> int:
        """Survivors of a step on so many processes: of each group that is compared, as many as its budget."""
        batches = setting.accumulation * processes
        together = {"micro_batch": 1, "process": setting.accumulation, "all_processes": batches}
        compared = together[self.args.selection_scope]
        group = setting.rows * self.args.pool_factor * compared
        return batches // compared * budget_size(self.args.sample_ratio, group)

    def _run(self, setting: Setting) -> dict[str, Any]:
        candidates = setting.rows * setting.accumulation * self.args.pool_factor * self.processes
        run: dict[str, Any] = {
            "candidates": candidates,
            "survivors": self._survivors(setting, self.processes) if self.prunes else candidates,
            "steps": None,
            "tokens": None,
        }
        if self.args.max_steps > 0:
            run["steps"] = self.args.max_steps
        elif self.lengths.rows is not None:
            run["steps"] = math.ceil(math.ceil(self.lengths.rows / candidates) * self.args.num_train_epochs)
        if run["steps"] is not None:
            run["tokens"] = int(run["steps"] * candidates * self.lengths.tokens.mean())
        return run

    def _lengths(self) -> dict[str, Any]:
        tokens = sorted(self.lengths.tokens.tolist())
        quantiles = {f"{share}%": tokens[min(len(tokens) - 1, share * len(tokens) // 100)] for share in (50, 90, 99)}
        mean = float(self.lengths.tokens.mean())
        return {"mean": mean, **quantiles, "longest": self.lengths.longest, "source": self.lengths.source}

    def _notes(self, setting: Setting, card: float | None) -> list[str]:
        notes = [f"Rows: {self.lengths.source}."]
        if self.processes > 1:
            notes.append(
                f"Peaks are those of each of {self.processes} cards; DDP's copy of the gradients comes on top."
            )
        if setting.survivors == "auto" and setting.free_tokens is None and card is None:
            notes.append("`survivor_checkpointing: auto` uses what the card has left: `--card` says how much that is.")
        if self.prunes and (self.args.scoring_model or self.args.reference_model):
            notes.append("`scoring_model` and `reference_model` are not counted: add the size of their weights.")
        if self.args.reuses_scores:
            notes.append(
                "Time is that of a step in which all candidates are scored; with reused scores there are fewer."
            )
        return [*notes, COUNTED_TIME, NOT_COUNTED]


def _named(highest: Peak, peaks: dict[str, Peak]) -> dict[str, int]:
    """The parts of the highest peak; activations are named after the phase that makes them."""
    phase = next(name for name, peak in peaks.items() if peak is highest)
    names = {"activations": "scoring" if phase == "scoring" else "training micro-batch"}
    return {names.get(name, name): size for name, size in highest.by_part.items() if size > 0}
