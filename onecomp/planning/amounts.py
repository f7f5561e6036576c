"""The type of every amount in a plan: of operations, bytes, seconds or money."""

Amount = int | float
