"""The serving example: answers are generate()'s, over pages that come free and are used again."""

import pytest
import torch
from cases import DEVICE, REAL
from test_serving import SPARSE, generated, prompts, served
from tiny_models import tiny

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2} if REAL else {}  # head dim 64


@pytest.mark.parametrize("table_per_layer", [False, True])
@pytest.mark.parametrize("policy", [None, SPARSE], ids=["dense", "zipvl"])
def test_answers_are_those_of_generate(policy, table_per_layer):
    kind = tiny("llama", initializer_range=0.2 if REAL else 0.5, **SIZES)
    kind.model.to(DEVICE)
    asked = [{name: x.to(DEVICE) for name, x in inputs.items()} for inputs in prompts(kind, (200, 90, 313, 151))]
    expected = generated(kind, asked, policy)
    # 29 pages of 16 rows: not enough for all four at once.
    tokens, requests, most = served(kind, asked, policy, num_blocks=30, block_size=16, table_per_layer=table_per_layer)
    assert tokens == expected
    assert most > 1
    if policy:
        assert all(request.kept < 0.95 for request in requests)


def test_a_short_pool():
    """Requests give way to one another and come back."""
    kind = tiny("llama", initializer_range=0.2 if REAL else 0.5, **SIZES)
    kind.model.to(DEVICE)
    asked = [{name: x.to(DEVICE) for name, x in inputs.items()} for inputs in prompts(kind, (30, 30, 29))]
    expected = generated(kind, asked, SPARSE)
    tokens, requests, _ = served(kind, asked, SPARSE, num_blocks=18, block_size=4)
    assert tokens == expected
    assert torch.tensor([request.preemptions for request in requests]).sum() > 0
