"""The samples of a run, or of a scored data set, as the page draws them: points, groups, quadrants, and their texts."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..records.run import QUADRANTS, THRESHOLDS
from ..records.samples import SAMPLE_ID
from .plots import GROUP_COLOURS

if TYPE_CHECKING:
    import pandas as pd

# What is embedded, so that the page opens at once; the page says where it leaves something out.
MAX_WINDOWS = 20  # positions of the slider
MAX_GROUPS = len(GROUP_COLOURS) - 1
MAX_CARDS = 2000  # samples that can be searched, of all runs together
EXTREMES = 12  # most kept, and as many least kept, which are among them
HISTORY_SHOWN = 40  # latest decisions about one of them
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 600, 2000  # of one of them
HOVER_PROMPT, HOVER_ANSWER = 80, 160  # characters of a point's text
DROPPED, KEPT, FILLED = range(3)

Text = tuple[np.ndarray, np.ndarray]  # a sample's tokens, and which of them belong to its answer


class Texts(Protocol):
    """Where the samples' tokens come from: the record of a run, or a scored file."""

    def texts(self, sample_ids: Any) -> dict[int, Text]: ...

    def tokenizer(self) -> Any: ...


def with_outcome(samples: "pd.DataFrame") -> "pd.DataFrame":
    """Rows of a record, and what became of each: dropped, kept, or kept to fill the budget."""
    samples["filled"] = samples["reason"] == "fill"
    samples["outcome"] = np.where(samples["filled"], FILLED, np.where(samples["kept"], KEPT, DROPPED))
    return samples


def number(value: float) -> float | None:
    """As JSON has it: five digits, and no infinities."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def groups(samples: "pd.DataFrame") -> list[dict[str, Any]]:
    """Candidates and survivors by group, the largest first."""
    counts = samples.groupby("group")["kept"].agg(["size", "sum"]).sort_values("size", ascending=False)
    return [
        {"name": name, "candidates": int(size), "kept": int(kept)}
        for name, size, kept in counts.itertuples(index=True, name=None)
    ]


def quadrant_table(samples: "pd.DataFrame") -> dict[str, dict[str, int]]:
    """Candidates, survivors, those of them that filled the budget, and answer tokens kept, by quadrant."""
    table = {}
    for code, name in QUADRANTS.items():
        rows = samples[samples["quadrant"] == code]
        table[name] = {
            "candidates": len(rows),
            "kept": int(rows["kept"].sum()),
            "filled": int(rows["filled"].sum()),
            "kept_tokens": int(rows["kept_tokens"].sum()),
        }
    return table


def plane(samples: "pd.DataFrame", texts: "Decoder", max_points: int) -> dict[str, Any]:
    """
    Points of the EU plane in order of steps, and the windows of steps that the slider moves over.

    Beyond `max_points` it is the same random samples at every step, so that they can be followed.
    """
    if samples.empty:
        return {"points": None, "points_of": 0, "windows": [], "samples": []}
    chosen = samples.iloc[np.sort(np.argsort(shuffled(samples[SAMPLE_ID]), kind="stable")[:max_points])]
    first, last = int(samples["step"].min()), int(samples["step"].max())
    count = min(MAX_WINDOWS, last - first + 1)
    bounds = [first + round(index * (last - first + 1) / count) for index in range(count + 1)]
    windows = []
    for start, end in pairwise(bounds):
        rows = samples[(samples["step"] >= start) & (samples["step"] < end)]
        begin, stop = np.searchsorted(chosen["step"], [start, end]).tolist()
        windows.append({"first": start, "last": end - 1, "begin": begin, "end": stop, "of": len(rows)})
        windows[-1]["thresholds"] = {name: number(rows[name].mean()) for name in THRESHOLDS}
    names = [group["name"] for group in groups(samples)[:MAX_GROUPS]]
    index_of = {name: index for index, name in enumerate(names)}
    ids, place = np.unique(chosen[SAMPLE_ID], return_inverse=True)
    return {
        "points": {
            "sample": place.tolist(),
            "perplexity": [number(value) for value in chosen["perplexity"]],
            "entropy": [number(value) for value in chosen["entropy"]],
            "quadrant": chosen["quadrant"].tolist(),
            "outcome": chosen["outcome"].tolist(),
            "group": [index_of.get(name, len(names)) for name in chosen["group"]],
            "step": chosen["step"].tolist(),
        },
        "points_of": len(samples),
        "windows": windows,
        "samples": [[sample_id, *text] for sample_id, text in zip(ids.tolist(), texts.short(ids), strict=True)],
    }


def shuffled(sample_ids: "pd.Series") -> np.ndarray:
    """A number for each sample that has nothing to do with its place in the dataset; the same for the same sample."""
    return sample_ids.to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def cards(
    samples: "pd.DataFrame", masks: dict[int, tuple[int, list[bool]]], texts: "Decoder", max_cards: int
) -> dict[str, Any]:
    """
    Samples with their texts, the most often kept first; ties in an order of chance, the same each time.

    Args:
        samples (`pd.DataFrame`): As [`with_outcome`] gives them, in order of steps.
        masks (`dict`): By sample id, the latest step in which tokens of its answer were pruned, and which stayed.
        texts ([`Decoder`]): Theirs.
        max_cards (`int`): Of more samples it is random ones, and those at both ends.

    Returns:
        `dict`: `cards`, and `cards_of`, how many samples there are.
    """
    if samples.empty:
        return {"cards": [], "cards_of": 0}
    times = samples.groupby(SAMPLE_ID)["kept"].agg(["size", "sum"]).reset_index()
    times["chance"] = shuffled(times[SAMPLE_ID])
    order = times.sort_values(["sum", "size", "chance"], ascending=[False, True, True])
    least = times.sort_values(["sum", "size", "chance"], ascending=[True, False, True])[SAMPLE_ID]
    ends = [*order[SAMPLE_ID][:EXTREMES], *least[:EXTREMES]]
    rest = times.sort_values("chance")[SAMPLE_ID]
    chosen = list(dict.fromkeys([*ends, *rest]))[: max(max_cards, len(set(ends)))]
    shown = set(chosen)
    found = texts.source.texts(chosen)
    parts = dict(list(samples[samples[SAMPLE_ID].isin(shown)].groupby(SAMPLE_ID)))

    def card(sample_id: int) -> dict[str, Any]:
        history = parts[sample_id]
        step, mask = masks.get(sample_id, (None, None))
        prompt, answer = texts.pieces(found.get(sample_id), mask)
        latest = history.iloc[-1]
        tokens = [sum(mask), len(mask)] if mask is not None else None
        if tokens is None and latest["kept"] and latest["kept_tokens"] < latest["answer_tokens"]:
            tokens = [int(latest["kept_tokens"]), int(latest["answer_tokens"])]  # nobody wrote down which
        return {
            "id": int(sample_id),
            "group": latest["group"] if isinstance(latest["group"], str) else None,
            "scored": len(history),
            "kept": int(history["kept"].sum()),
            "perplexity": [number(history["perplexity"].iloc[0]), number(latest["perplexity"])],
            "entropy": [number(history["entropy"].iloc[0]), number(latest["entropy"])],
            "pruned": bool(latest["kept"] and latest["kept_tokens"] < latest["answer_tokens"]),
            "history": history[["step", "quadrant", "outcome"]].tail(HISTORY_SHOWN).to_numpy().tolist(),
            "prompt": prompt,
            "answer": answer,
            "pruned_at": step,
            "tokens": tokens,
        }

    return {"cards": [card(x) for x in order[SAMPLE_ID] if x in shown], "cards_of": len(times)}


class Decoder:
    """
    Texts of samples.

    Args:
        source ([`Texts`]): Where their tokens come from.
    """

    def __init__(self, source: Texts):
        self.source = source
        self.tokenizer = source.tokenizer()

    def _decode(self, ids: Any) -> str:
        if self.tokenizer is None:
            return " ".join(f"[{token}]" for token in ids)
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def short(self, sample_ids: np.ndarray) -> list[tuple[str, str]]:
        """The end of each prompt, and the beginning of each answer."""
        texts = self.source.texts(sample_ids.tolist())
        short = []
        for sample_id in sample_ids.tolist():
            if sample_id not in texts:
                short.append(("", "(text not recorded)"))
                continue
            ids, answer = texts[sample_id]
            start = int(answer.argmax()) if answer.any() else len(ids)
            # A token has a character at least, but for pieces of rare ones.
            prompt = self._decode(ids[max(0, start - HOVER_PROMPT) : start])
            reply = self._decode(ids[start : start + HOVER_ANSWER])
            cut = len(prompt) > HOVER_PROMPT or start > HOVER_PROMPT
            more = len(reply) > HOVER_ANSWER or len(ids) > start + HOVER_ANSWER
            short.append((("…" if cut else "") + prompt[-HOVER_PROMPT:], reply[:HOVER_ANSWER] + ("…" if more else "")))
        return short

    def pieces(self, text: Text | None, mask: list[bool] | None) -> tuple[str, list[list[Any]]]:
        """
        The prompt, and what follows it in pieces: `[text, kind]`, kind 0 for kept, 1 for pruned, 2 for no answer (a
        later turn of the user).
        """
        if text is None:
            return "", [["(text not recorded)", 2]]
        ids, answer = text
        kinds = np.where(answer, 0, 2)
        if mask is not None and len(mask) == answer.sum():
            kinds[answer] = np.where(mask, 0, 1)
        start = int(answer.argmax())
        prompt = self._decode(ids[:start])
        if len(prompt) > PROMPT_CHARACTERS:
            prompt = "…" + prompt[-PROMPT_CHARACTERS:]
        ids, kinds = ids[start : start + ANSWER_CHARACTERS], kinds[start : start + ANSWER_CHARACTERS]
        whole = self._decode(ids)
        pieces: list[list[Any]] = []
        done = 0
        # Cut where the kind changes, but decoded from the start: a token's text depends on those before it (spaces). A
        # character of several tokens goes with the last of them.
        for end in [*(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]:
            so_far = whole if end == len(ids) else self._decode(ids[:end]).rstrip("\ufffd")
            if len(so_far) > done:
                pieces.append([so_far[done:], int(kinds[end - 1])])
                done = len(so_far)
            if done >= ANSWER_CHARACTERS and (done < len(whole) or done > ANSWER_CHARACTERS):
                pieces[-1][0] = pieces[-1][0][: len(pieces[-1][0]) - (done - ANSWER_CHARACTERS)]
                pieces.append(["…", 2])
                break
        return prompt, pieces
