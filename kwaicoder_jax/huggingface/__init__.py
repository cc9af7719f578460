"""Models of other people in, ours out, in the files that Hugging Face transformers (and llama.cpp, in) read and write.

source = open_model("SmolLM2-135M")            # a folder as save_pretrained writes it, or a GGUF file
params = load(source, shardings)               # onto devices, or save(source, "runs/x/checkpoints", meta=...)
exported = plan_export(tensors, config, tokenizer=tokenizer)
export(tensors, exported, "runs/x/model")      # AutoModelForCausalLM.from_pretrained("runs/x/model")
"""

from kwaicoder_jax.huggingface.exporting import Exported, export, plan_export
from kwaicoder_jax.huggingface.families import FAMILIES
from kwaicoder_jax.huggingface.importing import load, save
from kwaicoder_jax.huggingface.source import COMPANIONS, PARAM_DTYPES, Source, open_model, read_config

__all__ = [
    "COMPANIONS",
    "FAMILIES",
    "PARAM_DTYPES",
    "Exported",
    "Source",
    "export",
    "load",
    "open_model",
    "plan_export",
    "read_config",
    "save",
]
