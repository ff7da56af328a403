"""What the key layerwise of a recipe means."""

import pytest

import htsr
from htsr.finetuning.rates import policy_of
from htsr.training.layerwise.policy import make_policy


@pytest.mark.parametrize(
    ("layerwise", "policy"),
    [
        ("none", None),
        ("ends", make_policy("ends")),
        ("tempbalance", make_policy("tempbalance", interval=7)),
        ({"policy": "tempbalance", "bounds": [0.7, 1.3]}, make_policy("tempbalance", interval=7, bounds=(0.7, 1.3))),
        ({"policy": "tempbalance", "interval": 3}, make_policy("tempbalance", interval=3)),
        ({"score": None, "embeddings": 5}, make_policy(score=None, embeddings=5)),
        ({"head": 2, "embeddings": "max"}, make_policy(head=2)),
        ({"windows": {"rows": 64, "count": 5}, "exclude": ["mlp.*"]},
         make_policy(windows=htsr.Windows(64, 5), exclude=("mlp.*",))),
        ({"*.lora_B": 16}, make_policy({"*.lora_B": 16})),
        ({"head": 5}, make_policy({"head": 5})),  # a role: of nothing but patterns
        ({"head": 5, "attn.*": 2}, make_policy({"head": 5, "attn.*": 2})),
    ],
)  # fmt: skip
def test_policy_of(layerwise, policy):
    assert policy_of(layerwise, epoch_steps=7) == policy
