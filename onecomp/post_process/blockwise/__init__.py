"""Block-wise training: one block at a time, or two, over the workers of an executor."""
