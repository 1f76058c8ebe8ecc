"""How much faster one candidate is than another, and what the spread of the rounds allows to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence, Tuple

import numpy as np

#: Fewest rounds a comparison is drawn from.
LEAST_ROUNDS = 5
#: A middle-80-% range of ratios wider than this share of their median cannot size a difference.
WIDE = 0.20


def speedup(base: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Tuple[float, float, float]:
    """How many times faster one candidate is than another, from rounds in which both took a turn.

    Args:
        base: what is compared with: of each round the seconds of its calls.
        other: the candidate, in the same rounds.

    Returns:
        Median over the rounds of (median time of ``base``) / (median time of ``other``), and the 10th
        and 90th percentile.
    """
    ratios = [np.median(a) / np.median(b) for a, b in zip(base, other)]
    return float(np.median(ratios)), float(np.percentile(ratios, 10)), float(np.percentile(ratios, 90))


@dataclass(frozen=True)
class Ratio:
    """How much faster one candidate is than another.

    Attributes:
        name, base: the candidates.
        speedup: median over rounds of (median time of ``base``) / (median time of ``name``).
        low, high: the middle 80 % of the rounds' ratios lies between them.
        rounds: how many there were.
        verdict: ``"faster"``, ``"slower"``, ``"equal"`` (the range holds 1 and is narrow) or
            ``"inconclusive"``.
        warning: what keeps the figure from being trusted; empty if nothing does.
    """

    name: str
    base: str
    speedup: float
    low: float
    high: float
    rounds: int
    verdict: str
    warning: str

    def __str__(self) -> str:
        return f"{self.speedup:.2f} ({self.low:.2f}-{self.high:.2f})"


def judge(name: str, base: str, times: Tuple[float, float, float], rounds: int) -> Ratio:
    """Says what the spread of the rounds' ratios allows to conclude.

    Args:
        name: the candidate.
        base: what it is compared with.
        times: how many times faster ``name`` is: the median over the rounds, the 10th and 90th percentile.
        rounds: how many.
    """
    ratio, low, high = times
    wide = (high - low) / ratio > WIDE
    few = rounds < LEAST_ROUNDS
    if few or (low <= 1 <= high and wide):
        verdict = "inconclusive"
    elif low <= 1 <= high:
        verdict = "equal"
    else:
        verdict = "faster" if low > 1 else "slower"
    warning = ""
    if few:
        warning = f"only {rounds} rounds: at least {LEAST_ROUNDS} are needed; give more --seconds"
    elif wide:
        what = "cannot tell which is faster"
        if verdict != "inconclusive":
            what = f"{verdict}, but by how much is uncertain"
        warning = (
            f"the spread {low:.2f}-{high:.2f} is too wide: {what}; close other programs, fix the clocks "
            "or give more --seconds"
        )
    return Ratio(name, base, ratio, low, high, rounds, verdict, warning)
