# SPDX-License-Identifier: Apache-2.0
"""Tiny random models under the names that PEFT's tests ask the Hub for, laid out as a Hub cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

import peft
import torch
import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers


WORDS = 1024
CAUSAL, SEQ2SEQ = t.AutoModelForCausalLM, t.AutoModelForSeq2SeqLM
ENCODER, CLASSIFIER = t.AutoModel, t.AutoModelForSequenceClassification


def configurations() -> dict[str, tuple[type, t.PretrainedConfig]]:
    """Hub id → auto class and configuration. Weights are drawn large, so that an adapter shows in the output."""
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    small = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = {**small, **ends, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
    gpt = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, **ends}
    bert = {**small, "intermediate_size": 48, "initializer_range": 0.2, "num_labels": 2, "hidden_dropout_prob": 0.0}
    deberta = {**bert, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}
    opt = {**small, **ends, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 256, "dropout": 0.0}
    # bitsandbytes packs blocks of 64, and a test counts 12 layers.
    wide = {"num_hidden_layers": 12, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
    llama = t.LlamaConfig(**decoder)
    gpt2 = t.GPT2Config(**gpt, initializer_range=0.2)
    bert_config = t.BertConfig(**bert)
    return {
        "peft-internal-testing/tiny-random-OPTForCausalLM": (CAUSAL, t.OPTConfig(**opt, init_std=0.2)),
        "peft-internal-testing/opt-125m": (CAUSAL, t.OPTConfig(**{**opt, **wide})),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel": (CAUSAL, gpt2),
        "peft-internal-testing/tiny-random-gpt2": (CAUSAL, gpt2),
        "hf-internal-testing/tiny-random-gpt2": (CAUSAL, gpt2),
        "openai-community/gpt2": (CAUSAL, gpt2),
        "gpt2": (CAUSAL, gpt2),
        "peft-internal-testing/tiny-random-GPTJForCausalLM": (
            CAUSAL,
            t.GPTJConfig(**gpt, rotary_dim=4, initializer_range=0.2),
        ),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": (CAUSAL, llama),
        "hf-internal-testing/tiny-random-LlamaForCausalLM": (CAUSAL, llama),
        "hf-internal-testing/tiny-random-MistralForCausalLM": (CAUSAL, t.MistralConfig(**decoder)),
        # Upstream's Qwen2 has small weights, and a test of LoRA conversion relies on that.
        "peft-internal-testing/tiny-dummy-qwen2": (CAUSAL, t.Qwen2Config(**{**decoder, "initializer_range": 0.02})),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (CAUSAL, t.Gemma3TextConfig(**decoder, head_dim=8)),
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
            SEQ2SEQ,
            t.T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4,
                       decoder_start_token_id=0, dropout_rate=0.0),
        ),
        "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
            SEQ2SEQ,
            t.BartConfig(vocab_size=WORDS, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                         decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.2, dropout=0.0,
                         max_position_embeddings=256, decoder_start_token_id=2, **ends),
        ),
        "peft-internal-testing/tiny-random-BertModel": (ENCODER, bert_config),
        "peft-internal-testing/tiny-random-RobertaModel": (ENCODER, t.RobertaConfig(**bert, pad_token_id=1)),
        "peft-internal-testing/tiny-random-DebertaModel": (ENCODER, t.DebertaConfig(**deberta)),
        "peft-internal-testing/tiny-random-DebertaV2Model": (ENCODER, t.DebertaV2Config(**deberta)),
        "peft-internal-testing/tiny-random-BertForSequenceClassification": (CLASSIFIER, bert_config),
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
            CLASSIFIER,
            t.RobertaConfig(**bert, pad_token_id=1),
        ),
        "bert-base-uncased": (CLASSIFIER, bert_config),
        "google-bert/bert-base-uncased": (CLASSIFIER, bert_config),
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
            CLASSIFIER,
            t.LlamaConfig(**decoder, num_labels=2),
        ),
    }  # fmt: skip


def build_cache(folder: Path) -> None:
    """Writes all models into `folder`, unless an earlier call did."""
    source = hashlib.sha1(Path(__file__).read_bytes()).hexdigest()
    done = folder / f"done-{t.__version__}-{source[:8]}"
    if done.exists():
        return
    t.logging.set_verbosity_error()
    tokenizer = _tokenizer()
    for name, (auto_class, config) in configurations().items():
        torch.manual_seed(0)
        snapshot = _snapshot(folder, name, "main")
        auto_class.from_config(config).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
    lora = peft.LoraConfig(base_model_name_or_path="peft-internal-testing/opt-125m", target_modules=["q_proj"])
    lora.save_pretrained(str(_snapshot(folder, "peft-internal-testing/tiny-opt-lora-revision", "test")))
    done.touch()


def _snapshot(folder: Path, name: str, revision: str) -> Path:
    commit = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
    repository = folder / ("models--" + name.replace("/", "--"))
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    for reference in {revision, "main"}:
        (repository / "refs" / reference).write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def _tokenizer() -> t.PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS - 4))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=256,
    )  # fmt: skip
