"""Values that change over a run, as functions of how much of it is done. Knows no optimiser."""

import math


def cosine(start: float, end: float, done: float, *, warmup: float = 0.0) -> float:
    """From `start` to `end` along half a cosine, after a linear rise from 0 to `start`.

    done: share of the run that is over, 0..1. warmup: share of the run that the rise takes.
    Source: main_dino.py's cosine_scheduler (arXiv 2104.14294, section 3.2), with steps turned into shares.
    """
    if done < warmup:
        return start * done / warmup
    along = (done - warmup) / (1.0 - warmup) if warmup < 1.0 else 1.0
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(along, 1.0)))


def linear_then_constant(start: float, end: float, done: float, *, warmup: float) -> float:
    """From `start` to `end` in a straight line over the first `warmup` of the run, then `end` (teacher temperature)."""
    if done >= warmup:
        return end
    return start + (end - start) * done / warmup
