# SPDX-License-Identifier: Apache-2.0
"""The papers' models and data in miniature, under their own names: same architectures, tokenizers' quirks, score
models, templates and columns, with random weights. A name such as `org/model` is a folder of the working directory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trl_parm.reward_models import ScoreModel


LLAMA_2_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TULU = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + (eos_token if m['role'] == 'assistant' "
    "else '') + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TOPICS = ("a fence", "a sad friend", "the moon", "lock picking", "bread", "a loud dog", "old maps", "rain")


def llama_tokenizer(chat_template: str | None = None, pad: bool = False) -> PreTrainedTokenizerFast:
    """LLaMA's vocabulary by size and kind: 32,000 pieces with bytes for what is none, and Alpaca's pad token as the
    32,001st."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"#()[]|<>/_-"]
    pieces += letters + [f"▁{a}{b}" for a in letters[1:27] for b in letters[1:27]]
    pieces += [f"▁{number}~" for number in range(32_000 - len(pieces))]
    merges = [("▁", letter) for letter in letters[1:27]]
    pieces = pieces[:-26] + [f"▁{letter}" for letter in letters[1:27]]
    merges += [(f"▁{a}", b) for a in letters[1:27] for b in letters[1:27]]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    from tokenizers.processors import TemplateProcessing

    core.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template,
        model_max_length=2048,
    )  # fmt: skip
    if pad:
        made.add_special_tokens({"pad_token": "[PAD]"})
    return made


def llama(folder: Path, seed: int, rows: int, hidden: int = 16, chat: str | None = None, pad: bool = False) -> None:
    """A LLaMA whose embeddings may have more rows than its tokenizer has tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    llama_tokenizer(chat, pad).save_pretrained(folder)


def beaver(folder: Path, seed: int, kind: str) -> None:
    """A score model of Safe-RLHF: `LlamaForScore`, with its head and its normalizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32_001, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.2, score_dim=1, score_type=kind,
        do_normalize=False,
    )  # fmt: skip
    model = ScoreModel(config)
    with torch.no_grad():
        model.score_head.weight.normal_(std=2.0)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "architectures": ["LlamaForScore"]}))
    llama_tokenizer(pad=True).save_pretrained(folder)


def classifier(folder: Path, seed: int, kind: type, config: object) -> None:
    torch.manual_seed(seed)
    kind(config).save_pretrained(folder)
    tokenizer = llama_tokenizer(pad=True)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)


def make_world(folder: Path) -> SimpleNamespace:
    """All that the configurations of the papers' experiments name."""
    llama(folder / "PKU-Alignment/alpaca-7b-reproduced", 0, 32_001, pad=True)
    llama(folder / "TheBloke/alpaca-lora-65B-GPTQ", 1, 32_000, hidden=32)
    llama(folder / "meta-llama/Llama-2-7b-chat-hf", 2, 32_000, hidden=32, chat=LLAMA_2_CHAT)
    llama(folder / "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 3, 32_000, chat=ZEPHYR)
    llama(folder / "allenai/tulu-2-7b", 4, 32_001, chat=TULU, pad=True)
    llama(folder / "allenai/tulu-2-13b", 5, 32_001, hidden=32, chat=TULU, pad=True)
    beaver(folder / "PKU-Alignment/beaver-7b-v1.0-reward", 6, "reward")
    beaver(folder / "PKU-Alignment/beaver-7b-v1.0-cost", 7, "cost")
    gpt2 = GPT2Config(vocab_size=32_001, n_embd=16, n_layer=2, n_head=4, n_positions=1024, num_labels=1,
                      initializer_range=0.2, pad_token_id=32_000)  # fmt: skip
    classifier(folder / "Ray2333/gpt2-large-helpful-reward_model", 8, GPT2ForSequenceClassification, gpt2)
    classifier(folder / "Ray2333/gpt2-large-harmless-reward_model", 9, GPT2ForSequenceClassification, gpt2)
    bert = DistilBertConfig(vocab_size=32_001, dim=16, n_layers=2, n_heads=4, hidden_dim=32, num_labels=2,
                            initializer_range=0.2, pad_token_id=32_000)  # fmt: skip
    classifier(folder / "mohameddhiab/humor-no-humor", 10, DistilBertForSequenceClassification, bert)
    safe = [
        {
            "prompt": f"What about {topic} {i}?", "response_0": f"{topic} is {'fine ' * (i % 3)}.",
            "response_1": f"Never mind {topic}.", "is_response_0_safe": True, "is_response_1_safe": i % 2 == 0,
            "better_response_id": i % 2, "safer_response_id": (i + 1) % 2,
        }
        for i in range(5)
        for topic in TOPICS
    ]  # fmt: skip
    helpful = [
        {
            "prompt": [{"role": "user", "content": f"Tell me about {topic} {i}"}],
            "chosen": [{"role": "assistant", "content": f"{topic} is {'good ' * (i % 3)}."}],
            "rejected": [{"role": "assistant", "content": f"no {topic}"}],
        }
        for i in range(5)
        for topic in TOPICS
    ]  # fmt: skip
    for name, rows in {"PKU-Alignment/PKU-SafeRLHF-10K": safe, "trl-lib/hh-rlhf-helpful-base": helpful}.items():
        (folder / name).mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(str(folder / name / "train.parquet"))
    return SimpleNamespace(folder=folder, pairs=len(safe))
