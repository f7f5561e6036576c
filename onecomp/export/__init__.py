"""Checkpoints: packing, writing block by block, loading, verifying."""
