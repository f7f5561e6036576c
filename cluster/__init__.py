"""Ray plumbing that knows nothing of quantization: connecting, actor pools, errors."""
