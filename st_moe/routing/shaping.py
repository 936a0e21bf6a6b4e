"""Scores to scores: `f(scores, ctx, rng, kept, *, ...) -> Scores`."""

SHAPING = {}
