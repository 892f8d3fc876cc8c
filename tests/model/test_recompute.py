import pytest

from lowmem.config.schema import Level
from lowmem.model.recompute import keeps_attention, keeps_mlp, level_of


@pytest.mark.parametrize(
    ("level", "attention", "mlp"),
    [("keep", True, True), ("attn", True, False), ("full", False, False)],
)
def test_a_level_keeps_what_its_name_says(level: Level, attention: bool, mlp: bool) -> None:
    assert keeps_attention(level) is attention
    assert keeps_mlp(level) is mlp


@pytest.mark.parametrize("level", ["keep", "attn", "full"])
def test_the_last_block_always_keeps(level: Level) -> None:
    assert [level_of(i, 3, level) for i in range(3)] == [level, level, "keep"]
