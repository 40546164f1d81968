"""
Pruners by name: who decides which samples of a pool survive (stage 1), and which of their answer tokens (stage 2).

The tables below are all there is; `register_sample_pruner` and `register_token_pruner` add a row. Any sample pruner
goes with any token pruner.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from . import authors_code, samples, tokens
from .samples import Pool
from .tokens import Answers

__all__ = ["Answers", "Pool", "register_sample_pruner", "register_token_pruner", "sample_pruner", "token_pruner"]

Prune = Callable[[Any], Any]


@dataclass(frozen=True)
class Pruner:
    """
    A pruner and what it needs of the run; what no pruner of the run needs is not computed.

    Args:
        prune (`Callable`): Takes a [`Pool`] or [`Answers`]. A sample pruner returns a `Tensor` of shape `(samples,)`,
            bool for those it keeps; with `"weights"`, float for the weights of their losses, 0 for those it drops. A
            token pruner returns a `Tensor` of shape `(samples, positions)`, bool for the answer tokens it keeps; with
            `"weights"`, float for the weights of their losses, 0 for those it drops: for how many of all answer tokens
            each stands, since the loss is divided by all those of the survivors.
        needs (`tuple[str, ...]`): See `SAMPLE_NEEDS` and `TOKEN_NEEDS`.
    """

    prune: Prune
    needs: tuple[str, ...] = ()


SAMPLE_NEEDS = {
    "scores": "`perplexity` and `entropy`: a gradient-free forward over the pool",
    "sequence_entropy": "`sequence_entropy`, with `scores`: the forward gives the entropy at prompt positions too",
    "prompts": "`prompt_characters` and `prompt_character_entropy`: each prompt as text",
    "column": "`column`: the dataset column that `score_column` names",
    "weights": "the losses of its survivors are weighted",
}
TOKEN_NEEDS = {
    "scores": "`nll` and `entropy`: of the sample pruner's forward, otherwise one without gradients over the survivors",
    "reference": "`reference_nll`: a forward of `reference_model` over the survivors",
    "base": "`base_nll`: a forward over the survivors of the model as it was before fine-tuning",
    "marked": "only the survivors that the sample pruner marks, Q-Tuning's those on Q2's side; otherwise all survivors",
    "weights": "the losses of the tokens it keeps are weighted",
    "attention": "`attention` and `embeddings`: a forward over each survivor, with eager attention",
}

_SAMPLE_PRUNERS = {
    "q_tuning": Pruner(samples.q_tuning, ("scores",)),
    "random": Pruner(samples.random),
    "longest": Pruner(samples.longest),
    "entropy_high": Pruner(samples.entropy_high, ("scores",)),
    "entropy_middle": Pruner(samples.entropy_middle, ("scores",)),
    "entropy_low": Pruner(samples.entropy_low, ("scores",)),
    "perplexity_high": Pruner(samples.perplexity_high, ("scores",)),
    "perplexity_middle": Pruner(samples.perplexity_middle, ("scores",)),
    "perplexity_low": Pruner(samples.perplexity_low, ("scores",)),
    "excess": Pruner(samples.excess, ("scores",)),
    "infobatch": Pruner(samples.infobatch, ("scores", "weights")),
    "column": Pruner(samples.column, ("column",)),
    "q_tuning_code": Pruner(authors_code.q_tuning_code, ("scores", "sequence_entropy")),
    "longest_code": Pruner(authors_code.longest_code, ("prompts",)),
    "entropy_code": Pruner(authors_code.entropy_code, ("prompts",)),
    "none": Pruner(samples.none),
}
_TOKEN_PRUNERS = {
    "q_tuning": Pruner(tokens.q_tuning, ("scores", "marked")),
    "random": Pruner(tokens.random),
    "easiest": Pruner(tokens.easiest, ("scores",)),
    "hardest": Pruner(tokens.hardest, ("scores",)),
    "uncertain": Pruner(tokens.uncertain, ("scores",)),
    "importance": Pruner(tokens.importance, ("scores", "weights")),
    "rho1": Pruner(tokens.rho1, ("scores", "reference")),
    "token_cleaning": Pruner(tokens.token_cleaning, ("base", "reference")),
    "fastv": Pruner(tokens.fastv, ("attention",)),
    "sparsevlm": Pruner(tokens.sparsevlm, ("attention",)),
    "q_tuning_code": Pruner(authors_code.q_tuning_code_tokens, ("scores", "marked")),
    "none": Pruner(tokens.none),
}
# Earlier names, which did not say which end is kept.
_EARLIER_NAMES = {
    "sample": {"perplexity": "perplexity_high", "entropy": "entropy_high"},
    "token": {"perplexity": "easiest"},
}


def register_sample_pruner(name: str, needs: Sequence[str] = ()) -> Callable[[Prune], Prune]:
    """
    Add a sample pruner, so that `sample_pruner` can name it.

    Args:
        name (`str`): Its name, not taken yet.
        needs (`Sequence[str]`): What it needs, of `"scores"`, `"sequence_entropy"`, `"prompts"`, `"column"` and
            `"weights"`; see [`Pruner`].

    Returns:
        `Callable`: A decorator for a function that takes a [`Pool`] and returns a `Tensor` of shape `(samples,)`.

    Raises:
        `ValueError`: If the name is taken, or it needs something else.

    Example:
    ```python
    @register_sample_pruner("shortest")
    def shortest(pool):
        return pool.keep_highest(-pool.lengths)
    ```
    """
    return _registration("sample", _SAMPLE_PRUNERS, SAMPLE_NEEDS, name, needs)


def register_token_pruner(name: str, needs: Sequence[str] = ()) -> Callable[[Prune], Prune]:
    """
    Add a token pruner, so that `token_pruner` can name it.

    Args:
        name (`str`): Its name, not taken yet.
        needs (`Sequence[str]`): What it needs, of `"scores"`, `"reference"`, `"base"`, `"marked"`, `"weights"` and
            `"attention"`; see [`Pruner`].

    Returns:
        `Callable`: A decorator for a function that takes [`Answers`] and returns a `Tensor` of the shape of
        `answers.answer_mask`.

    Raises:
        `ValueError`: If the name is taken, or it needs something else.

    Example:
    ```python
    @register_token_pruner("first_half")
    def first_half(answers):
        return answers.keep_lowest(answers.answer_mask.double().cumsum(dim=1))
    ```
    """
    return _registration("token", _TOKEN_PRUNERS, TOKEN_NEEDS, name, needs)


def sample_pruner(name: str) -> Pruner:
    """The sample pruner of that name; `module:name` imports the module that registers it. `ValueError` if none is."""
    return _look_up("sample", _SAMPLE_PRUNERS, name)


def token_pruner(name: str) -> Pruner:
    """The token pruner of that name; `module:name` imports the module that registers it. `ValueError` if none is."""
    return _look_up("token", _TOKEN_PRUNERS, name)


def _registration(
    stage: str, pruners: dict[str, Pruner], known: dict[str, str], name: str, needs: Sequence[str]
) -> Callable[[Prune], Prune]:
    if name in {*pruners, *_EARLIER_NAMES[stage]}:
        raise ValueError(f"There is a {stage} pruner {name!r} already: register yours by another name.")
    unknown = [need for need in needs if need not in known]
    if unknown:
        raise ValueError(
            f"The {stage} pruner {name!r} needs {unknown[0]!r}: choose of {', '.join(map(repr, known))}, or nothing."
        )

    def register(prune: Prune) -> Prune:
        pruners[name] = Pruner(prune, tuple(needs))
        return prune

    return register


def _look_up(stage: str, pruners: dict[str, Pruner], given: str) -> Pruner:
    module, _, name = str(given).rpartition(":")
    if module:
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(
                f"`{stage}_pruner` is {given!r}, and the module {module!r} cannot be imported ({error}): put its "
                "folder on the PYTHONPATH."
            ) from error
    if name in _EARLIER_NAMES[stage]:
        new = _EARLIER_NAMES[stage][name]
        warnings.warn(f"`{stage}_pruner` {name!r} is now called {new!r}: use that name.", FutureWarning, stacklevel=3)
        name = new
    if name not in pruners:
        nearest = get_close_matches(name, pruners, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(
            f"`{stage}_pruner` is {given!r}: {hint}choose one of {', '.join(map(repr, pruners))}, or register your own "
            f"with `register_{stage}_pruner`."
        )
    return pruners[name]
