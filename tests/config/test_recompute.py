import pytest

from lowmem.config.recompute import (
    Level,
    checked,
    in_words,
    keeps_attention,
    keeps_mlp,
    levels_of,
    one_level_down,
)


@pytest.mark.parametrize(
    ("level", "attention", "mlp"),
    [("keep", True, True), ("attn", True, False), ("full", False, False)],
)
def test_a_level_keeps_what_its_name_says(level: Level, attention: bool, mlp: bool) -> None:
    assert keeps_attention(level) is attention
    assert keeps_mlp(level) is mlp


@pytest.mark.parametrize("level", ["keep", "attn", "full"])
def test_the_last_block_always_keeps(level: Level) -> None:
    assert levels_of(level, 3) == (level, level, "keep")
    assert levels_of(level, 1) == ("keep",)


def test_levels_count_from_the_last_block_downwards() -> None:
    assert levels_of("keep:2,attn:1,full", 5) == ("full", "full", "attn", "keep", "keep")
    assert levels_of("attn:3,full", 4) == ("full", "attn", "attn", "keep")


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_words_mean_what_they_were_made_of(blocks: int) -> None:
    for keep in range(1, blocks + 1):
        for attn in range(blocks - keep + 1):
            found = levels_of(in_words(keep, attn, blocks), blocks)
            rest = blocks - keep - attn
            assert list(found) == ["full"] * rest + ["attn"] * attn + ["keep"] * keep


@pytest.mark.parametrize("text", ["", "kept", "keep:,full", "keep:2", "keep,full", "keep:-1,full"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a level"):
        checked(text)


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="names 9 blocks, the model has 8"):
        levels_of("keep:9,full", 8)


@pytest.mark.parametrize("before", ["keep", "attn", "full", "keep:3,attn:2,full", "keep:2,attn"])
def test_one_level_down_for_every_block_but_the_last(before: str) -> None:
    down = {"keep": "attn", "attn": "full", "full": "full"}
    *blocks, last = levels_of(before, 8)
    assert levels_of(one_level_down(before, 8), 8) == (*(down[level] for level in blocks), last)
