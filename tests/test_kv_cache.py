# SPDX-License-Identifier: Apache-2.0
"""A forward's cache under each of its names."""

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from torch import nn
from transformers import DynamicCache

from peft_pblora.kv_cache import cache_argument, cache_in, takes_cache


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None):
        return past_key_values


class New(nn.Module):
    def forward(self, input_ids, cache=None, **kwargs):
        return cache


class Recurrent(nn.Module):
    def forward(self, input_ids, cache_params=None):
        return cache_params


@pytest.mark.parametrize("kind", [Old, New, Recurrent])
def test_a_forward_gets_its_cache_under_its_own_name(kind):
    cache = DynamicCache()
    assert takes_cache(kind())
    assert kind()(None, **cache_argument(kind(), cache)) is cache
    assert cache_in({"input_ids": None, **cache_argument(kind(), cache)}) is cache


def test_a_model_of_transformers_fills_it():
    arm = tiny_arm(tiny_llama())
    cache = DynamicCache()
    with torch.no_grad():
        arm(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True, **cache_argument(arm, cache))
    assert cache.get_seq_length() == 3


def test_no_cache():
    assert cache_in({"cache": None, "past_key_values": None, "cache_params": None}) is None
    assert not takes_cache(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="A Linear takes no key-value cache"):
        cache_argument(nn.Linear(2, 2), None)
