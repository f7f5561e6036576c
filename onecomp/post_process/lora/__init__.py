"""LoRA adapters on quantized models, by way of PEFT."""
