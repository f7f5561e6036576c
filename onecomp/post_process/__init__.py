"""What improves a model after it was quantized."""
