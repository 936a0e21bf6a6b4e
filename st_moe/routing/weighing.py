"""Seats to seats with other weights: `f(seats, ctx, rng, *, ...) -> Seats`.

A masked answer is a weight of 0: neither dispatchers nor losses need to know.
"""

WEIGHING = {}
