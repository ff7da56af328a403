"""Which parameters go with which matrix."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from htsr.training.layerwise.policy import Policy
from htsr.training.layerwise.units import ParameterUnit, decide, ends, fixed, pinned, unit_of, vector_role

NAMES = {"h.0.attn": 0, "h.0.attn.in_proj_weight": 1, "experts.gate_up_proj": 2, "emb": 3}


@pytest.mark.parametrize(
    ("parameter", "unit"),
    [
        ("h.0.attn.weight", 0),
        ("h.0.attn.bias", 0),
        ("h.0.attn.base_layer.bias", 0),
        ("h.0.attn.lora_A.default.weight", 0),
        ("h.0.attn.parametrizations.weight.original0", 0),
        ("h.0.attn.norm.weight", None),
        ("h.0.attn.in_proj_bias", 1),
        ("experts.gate_up_proj_bias", 2),
        ("emb.norm.weight", None),
        ("embedding.weight", None),
    ],
)
def test_followers(parameter, unit):
    assert unit_of(parameter, NAMES) == unit


def test_vectors():
    roles = {name: vector_role(name) for name in ("h.0.ln_1.weight", "norm.bias", "h.0.input_layernorm.weight", "cls")}
    assert list(roles.values()) == ["norm", "norm", "norm", "vector"]


def test_pins_of_fused_tensors():
    unit = ParameterUnit(
        "c_attn", "attn.qkv", 0, ("c_attn[q]", "c_attn[k]", "c_attn[v]"), ("attn.q", "attn.k", "attn.v"), 64
    )
    assert pinned(unit, {"attn.[qk]": 8, "attn.[vo]": 4}) == pytest.approx(20 / 3)
    assert pinned(unit, {"attn.[qk]": 8}) is None  # the value has none
    assert pinned(unit, {"attn.qkv": 2, "attn.*": 3}) == 2
    assert pinned(unit, {"c_*": 7}) == 7


def test_scores_of_parts_are_averaged_and_odd_ones_left_out():
    units = [
        ParameterUnit("a", "x", None, ("a[q]", "a[k]"), ("x.q", "x.k"), 64),
        ParameterUnit("b", "y", None, ("b",), ("y",), 64),
    ]
    units.append(ParameterUnit("c", "y", None, ("c",), ("y",), 64))
    outcome = decide(Policy(), units, fixed(Policy(), units), {"a[q]": 2.0, "a[k]": 4.0, "b": 5.0, "c": 2.0})
    assert outcome.scores == (3.0, 5.0, 2.0)
    assert outcome.multipliers == pytest.approx((1 + 4 / 3, 5, 1))
    outcome = decide(Policy(), units, fixed(Policy(), units), {"a[q]": 2.0, "a[k]": np.nan, "b": 5.0})
    assert outcome.scores[:2] == (2.0, 5.0)
    assert outcome.multipliers == (1.0, 5.0, 1.0)


class TestEmbeddings:
    body = tuple(ParameterUnit(n, "mlp.up", 0, (n,), ("mlp.up",), 64) for n in "ab")
    units = (ParameterUnit("emb", "embed", None, ("emb",), ("embed",), 64), *body)

    def test_max_is_the_largest_of_the_others(self):
        policy = Policy(map="sqrt", bounds=(0.0, 9.0))
        outcome = decide(policy, self.units, fixed(policy, self.units), {"a": 4.0, "b": 1.0})
        assert outcome.multipliers == pytest.approx((4 / 3, 4 / 3, 2 / 3))

    def test_max_of_nothing_known_is_one(self):
        outcome = decide(Policy(), self.units, fixed(Policy(), self.units), {})
        assert outcome.multipliers == (1.0, 1.0, 1.0)

    def test_max_where_nothing_is_measured_is_the_bound(self):
        policy = Policy(score=None)
        assert decide(policy, self.units, fixed(policy, self.units), {}).multipliers == (5.0, 1.0, 1.0)

    def test_stacks_have_embeddings_of_their_own(self):
        assert ParameterUnit("x", "decoder.embed").is_embedding
        assert ParameterUnit("x", "embed.position").is_embedding
        assert not ParameterUnit("x", "decoder.attn.q").is_embedding


@given(st.lists(st.floats(1.1, 9), min_size=2, max_size=8), st.floats(0.1, 10))
def test_llr_does_not_depend_on_the_scale_of_the_spread(scores, stretch):
    """Linear between the extremes: stretching all scores about any point changes nothing."""
    units = [ParameterUnit(str(i), "mlp.up", i, (str(i),), ("mlp.up",), 64) for i in range(len(scores))]
    if max(scores) - min(scores) > 1e-3:
        both = [
            decide(Policy(), units, [None] * len(units), {str(i): f(s) for i, s in enumerate(scores)}).multipliers
            for f in (lambda s: s, lambda s: 2 + stretch * s)
        ]
        assert both[0] == pytest.approx(both[1], rel=1e-6)


class TestEnds:
    """The first and the last layer, whatever their names say."""

    def units(self, *roles):
        return [ParameterUnit(f"{i}", role, None, (f"{i}",), (role,), 64) for i, role in enumerate(roles)]

    @pytest.mark.parametrize("last", ["other", "head"])
    @pytest.mark.parametrize("first", ["other", "conv", "embed"])
    def test_names_do_not_matter(self, first, last):
        assert ends(self.units(first, "mlp.up", "mlp.down", last)) == {0, 3}

    def test_tables_of_positions_are_no_first_layer(self):
        assert ends(self.units("embed", "embed.position", "mlp.up", "mlp.down", "head")) == {0, 1, 4}
        assert ends(self.units("conv", "embed.position", "mlp.up", "head")) == {0, 1, 3}

    def test_tied_embeddings_are_both(self):
        units = self.units("embed", "attn.q", "mlp.down")
        assert ends(units, tied=True) == {0}
        assert ends(units) == {0, 2}  # an encoder

    def test_vectors_have_no_place(self):
        vector = ParameterUnit("norm", "norm")
        assert ends([vector, *self.units("conv", "conv"), vector]) == {1, 2}
        assert ends([vector]) == set()


def test_one_wild_score_does_not_squeeze_the_others():
    tame = [2.0 + i / 20 for i in range(13)]
    units = [ParameterUnit(str(i), "mlp.up", i, (str(i),), ("mlp.up",), 64) for i in range(14)]
    for wild in (4e6, np.inf, 60.0, -4e6):
        scores = {str(i): score for i, score in enumerate([*tame, wild])}
        found = decide(Policy(), units, [None] * 14, scores).multipliers
        assert found[:13] == pytest.approx([1 + 4 * i / 12 for i in range(13)])
        assert found[13] == (5.0 if wild > 0 else 1.0)
