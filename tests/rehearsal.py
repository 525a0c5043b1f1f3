# SPDX-License-Identifier: Apache-2.0
"""The papers' models and data in miniature, on a local Hub under their own names: same architectures, sizes of
vocabularies, score models, chat templates and columns, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from datasets import Dataset
from hub_server import HubServer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
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
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TULU = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + (eos_token if m['role'] == 'assistant' "
    "else '') + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TOPICS = (
    "a fence",
    "a sad friend",
    "the moon 🌙",
    "lock picking",
    "bread {and} butter",
    "a loud dog",
    "old maps",
    "rain",
)
LONG = {("the moon 🌙", 1), ("bread {and} butter", 0)}
"""Prompts that are too long, of which each evaluation has one."""
PRIVATE = {"meta-llama/Llama-2-7b-chat-hf"}
"""Models that a token is needed for."""
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"#()[]{}|<>/_-"]
LLAMA_FILES = {"max_position_embeddings": 2048, "num_hidden_layers": 2, "initializer_range": 0.2}


def llama_tokenizer(chat_template: str | None = None, pad: str | None = None) -> PreTrainedTokenizerFast:
    """LLaMA's vocabulary by size and kind: 32,000 pieces, bytes for what is none; one more with a pad token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS]
    merges = [("▁", letter) for letter in LETTERS[:26]]
    merges += [(f"▁{a}", b) for a in LETTERS[:26] for b in LETTERS[:26]]
    pieces += [a + b for a, b in merges]
    pieces += [f"▁{number}~" for number in range(32_000 - len(pieces))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template,
        model_max_length=2048,
    )  # fmt: skip
    if pad:
        made.add_special_tokens({"pad_token": pad})
    return made


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's 50,257 tokens, of bytes, without one for padding."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"Ġ{number}~" for number in range(50_256 - len(pieces))]
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate([*pieces, "<|endoftext|>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=end, eos_token=end, unk_token=end, model_max_length=1024
    )


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """The 30,522 pieces of uncased BERT, which reads 512 at most."""
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [letter for letter in LETTERS if not letter.isupper()]
    pieces += [f"##{letter}" for letter in LETTERS if letter.isalnum() and not letter.isupper()]
    pieces += [f"{number}~" for number in range(30_522 - len(pieces))]
    core = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=512,
    )  # fmt: skip


class Papers:
    """Writes models and data into a folder, and puts them on a Hub. Each model has weights of its own."""

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder, self.hub, self.commits = folder, hub, {}

    def put(self, name: str, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, **config: object) -> None:
        folder = self.folder / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        self.commits[name] = self.hub.put(name, folder, private=name in PRIVATE)

    def llama(
        self, name: str, rows: int, hidden: int = 16, heads: int = 4, chat: str | None = None, pad: str | None = None
    ) -> None:
        """A LLaMA, whose embeddings may have more rows than its tokenizer has tokens."""
        torch.manual_seed(len(self.commits))
        config = LlamaConfig(
            vocab_size=rows, hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=4,
            num_key_value_heads=heads, **LLAMA_FILES,
        )  # fmt: skip
        self.put(name, LlamaForCausalLM(config).to(torch.bfloat16), llama_tokenizer(chat, pad))

    def beaver(self, name: str, kind: str) -> None:
        """A score model of Safe-RLHF: its class has a head and a normaliser, which no library knows."""
        torch.manual_seed(len(self.commits))
        config = LlamaConfig(
            vocab_size=32_001, hidden_size=16, intermediate_size=32, num_attention_heads=4, score_dim=1,
            score_type=kind, do_normalize=False, pad_token_id=32_000, **LLAMA_FILES,
        )  # fmt: skip
        model = ScoreModel(config)
        with torch.no_grad():
            model.score_head.weight.normal_(std=2.0)
        self.put(name, model, llama_tokenizer(pad="<pad>"), architectures=["LlamaForScore"])

    def classifier(self, name: str, kind: type, config: object, tokenizer: PreTrainedTokenizerFast) -> None:
        torch.manual_seed(len(self.commits))
        self.put(name, kind(config), tokenizer)

    def data(self, name: str, rows: list[dict]) -> None:
        folder = self.folder / "datasets" / name
        (folder / "data").mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(str(folder / "data/train-00000-of-00001.parquet"))
        self.hub.put(f"datasets/{name}", folder)


def too_long(topic: str, number: int) -> str:
    """The end of a prompt that has more tokens than the configurations allow, for some."""
    return " please" * 250 if (topic, number) in LONG else ""


def put_papers(folder: Path, hub: HubServer) -> dict[str, str]:
    """All that the configurations of the papers' experiments name; returns the commit of each model."""
    papers = Papers(folder, hub)
    papers.llama("PKU-Alignment/alpaca-7b-reproduced", 32_001, pad="<pad>")
    papers.llama("TheBloke/alpaca-lora-65B-GPTQ", 32_000, hidden=32)
    papers.llama("meta-llama/Llama-2-7b-chat-hf", 32_000, hidden=32, chat=LLAMA_2_CHAT)
    papers.llama("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 32_000, heads=2, chat=ZEPHYR)
    papers.llama("allenai/tulu-2-7b", 32_001, chat=TULU, pad="<pad>")
    papers.llama("allenai/tulu-2-13b", 32_008, hidden=32, chat=TULU, pad="<pad>")
    papers.beaver("PKU-Alignment/beaver-7b-v1.0-reward", "reward")
    papers.beaver("PKU-Alignment/beaver-7b-v1.0-cost", "cost")
    gpt2 = GPT2Config(vocab_size=50_257, n_embd=16, n_layer=2, n_head=4, num_labels=1, initializer_range=0.2)
    for name in ("helpful", "harmless"):
        papers.classifier(
            f"Ray2333/gpt2-large-{name}-reward_model", GPT2ForSequenceClassification, gpt2, gpt2_tokenizer()
        )
    bert = DistilBertConfig(
        dim=16, n_layers=2, n_heads=4, hidden_dim=32, id2label={0: "NO_HUMOR", 1: "HUMOR"}, initializer_range=0.2
    )
    papers.classifier("mohameddhiab/humor-no-humor", DistilBertForSequenceClassification, bert, bert_tokenizer())
    numbered = [(i, topic) for i in range(5) for topic in TOPICS]
    safe = [
        {
            "prompt": f"What about {topic} {i}?" + too_long(topic, i),
            "response_0": f"{topic} is {'fine ' * (i % 3)}.",
            "response_1": f"Never mind {topic}.",
            "is_response_0_safe": True,
            "is_response_1_safe": i % 2 == 0,
            "better_response_id": i % 2,
            "safer_response_id": (i + 1) % 2,
        }
        for i, topic in numbered
    ]
    turns = (("user", "Tell me"), ("assistant", "What?"), ("user", "All"))
    helpful = [
        {
            "prompt": [
                {"role": role, "content": f"{text} about {topic} {i}" + too_long(topic, i)}
                for role, text in turns[: 3 if i % 2 else 1]
            ],
            "chosen": [{"role": "assistant", "content": f"{topic} is {'good ' * (i % 3)}."}],
            "rejected": [{"role": "assistant", "content": f"no {topic}" if i else ""}],  # some of HH's are empty
        }
        for i, topic in numbered
    ]
    papers.data("PKU-Alignment/PKU-SafeRLHF-10K", safe)
    papers.data("trl-lib/hh-rlhf-helpful-base", helpful)
    return papers.commits
