import pytest
import torch
from peft import PeftModel

from onecomp.post_process.base import records_of
from onecomp.post_process.lora.process import PostProcessLoraTeacherOnlySFT

QUICK = {
    "max_length": 32,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "epochs": 3,
    "lora_r": 4,
    "lora_alpha": 8,
    "lr": 3e-3,
}
PEFTS_OWN = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
"""PEFT asks models by an old name."""
IDS = torch.arange(24).unsqueeze(0)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@PEFTS_OWN
def test_a_saved_adapter_gives_the_same_logits(quantized, original, jsonl, tmp_path):
    model = quantized()
    before = logits_of(model)
    process = PostProcessLoraTeacherOnlySFT(
        data_files=str(jsonl), output_dir=str(tmp_path / "adapter"), **QUICK
    )
    process.run(model, original)
    [entry] = records_of(model)
    print(entry)
    assert entry["executed"]
    after = logits_of(model)
    assert not torch.equal(before, after)
    loaded = PeftModel.from_pretrained(quantized(), str(tmp_path / "adapter"))
    assert torch.equal(logits_of(loaded), after)
