# SPDX-License-Identifier: Apache-2.0
"""Tiny real models made on the spot, so that no test needs the network."""

import gc
import os
import re
from importlib.util import find_spec


os.environ.setdefault("CI", "1")  # TRL sends no telemetry from CI
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_pblora import PBLoraConfig


OBJECTIVES = ["helpful", "harmless"]
before_5_24 = Version(transformers.__version__) < Version("5.24")
needs_add_adapter = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers' `add_adapter` wants peft {MIN_PEFT_VERSION}",
)
NEEDS = {"cuda": (torch.cuda.is_available(), "needs a GPU"), "deepspeed": (find_spec("deepspeed"), "needs DeepSpeed")}
"""Marker → whether there is what it needs, and what that is."""
WORDS = [f"w{i}" for i in range(58)]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        for marker, (there, reason) in NEEDS.items():
            if not there and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Every training collects garbage, which takes much longer among all that was imported and collected."""
    gc.collect()
    gc.freeze()


def tiny_llama(seed: int = 0, vocab_size: int = 64, **changes) -> LlamaForCausalLM:
    """A random two-layer Llama whose weights are large enough for its predictions to depend on its input."""
    torch.manual_seed(seed)
    config = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A random two-layer GPT-2: Conv1D layers and absolute positions."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, pad_token_id=0,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tiny_arm(model=None, objectives=OBJECTIVES, seed: int = 1, **config):
    """A PBLoRA model whose B is not zero, so that its preference matters."""
    torch.manual_seed(seed)
    settings = {"target_modules": ["q_proj", "k_proj", "v_proj"], "r1": 2, "r2": 3, "lora_alpha": 6}
    config = PBLoraConfig(objectives=list(objectives), task_type="CAUSAL_LM", **{**settings, **config})
    arm = get_peft_model(tiny_llama(seed) if model is None else model, config)
    for name, parameter in arm.named_parameters():
        if name.endswith("B.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    return arm.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 64 tokens with a chat template."""
    vocabulary = ["<pad>", "<eos>", "<unk>", "user", "assistant", "."] + WORDS
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(prefix="")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )


def response_ids(row: dict) -> list[int]:
    """The tokens of a row of results, which `tiny_tokenizer` decodes without spaces, the end token included."""
    words = re.findall(r"w\d+|\.|user|assistant", row["response"])
    return tiny_tokenizer().convert_tokens_to_ids(words) + [1] * (row["tokens"] - len(words))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 64 tokens that are characters, so that it reads numbers; `<bos>` is one of them."""
    characters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:;-+*/=()[]{}<> \n"]
    vocabulary = ["<pad>", "<eos>", "<unk>", "<bos>", *characters]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<bos>"
    )
