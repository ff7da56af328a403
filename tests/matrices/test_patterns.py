import pytest
from hypothesis import given
from hypothesis import strategies as st

from htsr import UsageError
from htsr.matrices.patterns import matches, require

NAMES = ("embed_tokens", "layers.0.attn.c_attn[q]", "layers.0.attn.c_attn[k]", "layers.0.mlp.up_proj")


@given(st.text(alphabet="abc[]!-.*?0", max_size=12))
def test_a_name_as_printed_matches_itself(name):
    assert matches(name, (name,))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.c_attn[q]", [1]),
        ("*[[]q]", []),
        ("*[qk]", []),
        ("*.c_attn[?]", [1, 2]),
        ("*.0.*", [1, 2, 3]),
        ("up_proj", []),
        ("embed_token?", [0]),
        ("", []),
    ],
)
def test_brackets_are_brackets(pattern, found):
    assert [i for i, name in enumerate(NAMES) if matches(name, (pattern,))] == found


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("*.c_atn[q]", r"no name of it matches '\*.c_atn\[q\]'; the nearest is \*.c_attn\[q\]$"),
        ("*.c_at[tu]n[[]q]", r"brackets are no wildcards, give one pattern per name$"),
        ("emebd_tokens", "matches 'emebd_tokens'; the nearest is embed_tokens$"),
        ("layers.0.mpl.*", "the nearest is layers.0.mlp.up_proj$"),
        ("*.mlp.upproj", "the nearest is mlp.up_proj$"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(pattern, sentence):
    require(["embed_tokens", "*.up_proj"], NAMES, "it")
    with pytest.raises(UsageError, match=sentence):
        require(["embed_tokens", pattern], NAMES, "it")


def test_where_there_is_nothing_to_be_near_to():
    with pytest.raises(UsageError, match=r"no role of an empty model matches 'embed'$"):
        require(["embed"], [], "an empty model", "role")
