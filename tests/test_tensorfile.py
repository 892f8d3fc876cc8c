"""Files written one tensor at a time are what the reference library reads."""

import hashlib
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.errors import CheckpointError
from lowmem.tensorfile import Pending, read_tensor, read_tensors, sha256_of, write_tensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (5, 3), (2, 3, 4)]


def example(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Values of `shape` that differ from each other and from zero where the dtype allows."""
    numbers = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return (numbers % 2 == 1) if dtype == torch.bool else numbers.to(dtype)


def same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_and_shape_is_read_back(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor, path = example(dtype, shape), tmp_path / "one.safetensors"
    write_tensors(path, [("a", tensor)])
    assert same(load_file(path)["a"], tensor)
    assert same(dict(read_tensors(path))["a"], tensor)


tables = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


@settings(deadline=None)
@given(tables, st.dictionaries(st.text(max_size=5), st.text(max_size=8), max_size=3))
def test_any_table_of_tensors_is_read_by_the_reference_library(
    table: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    tensors = {name: example(dtype, tuple(shape)) for name, (dtype, shape) in table.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        checksum = write_tensors(path, tensors.items(), metadata)
        with safe_open(path, framework="pt") as file:
            assert (file.metadata() or {}) == metadata
            assert set(file.keys()) == set(tensors)
            assert all(same(file.get_tensor(name), tensors[name]) for name in tensors)
        assert {name: t.shape for name, t in read_tensors(path)} == {
            name: t.shape for name, t in tensors.items()
        }
        assert checksum == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)


@settings(deadline=None)
@given(tables, st.dictionaries(st.text(max_size=5), st.text(max_size=8), max_size=1))
def test_the_file_equals_the_reference_librarys_byte_for_byte(
    table: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    """At most one entry of metadata: the reference library writes several in random order."""
    tensors = {name: example(dtype, tuple(shape)) for name, (dtype, shape) in table.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours"
        write_tensors(path, tensors.items(), metadata or None)
        assert path.read_bytes() == save(tensors, metadata or None)


def test_order_of_the_pairs_does_not_change_the_file(tmp_path: Path) -> None:
    pairs = [("b", torch.ones(3)), ("a", torch.ones(2).half()), ("c", torch.ones(1))]
    assert write_tensors(tmp_path / "x", pairs) == write_tensors(tmp_path / "y", pairs[::-1])


def test_views_that_are_not_contiguous_are_written_in_row_major_order(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"transposed": whole.T, "strided": whole[::2, 1::3], "expanded": whole[0].expand(3, 6)}
    write_tensors(tmp_path / "views", views.items())
    read = load_file(tmp_path / "views")
    assert all(torch.equal(read[name], view) for name, view in views.items())


def test_parameters_that_need_gradients_are_written(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(30, 20))
    write_tensors(tmp_path / "w", [("w", weight)])
    assert torch.equal(load_file(tmp_path / "w")["w"], weight)


class LiveCopies(TorchDispatchMode):
    """Counts how many clones exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.clones: list[weakref.ref[UntypedStorage]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            self.clones.append(weakref.ref(result.untyped_storage()))
            self.most = max(self.most, sum(clone() is not None for clone in self.clones))
        return result


def test_only_one_copy_lives_at_a_time(tmp_path: Path) -> None:
    pairs = [(name, torch.ones(8, 4).T) for name in "abcd"]  # transposed, so a copy is needed
    with LiveCopies() as copies:
        write_tensors(tmp_path / "copies", pairs)
    assert len(copies.clones) == len(pairs)
    assert copies.most == 1


def test_a_pending_tensor_is_made_when_it_is_written_and_then_forgotten(tmp_path: Path) -> None:
    shape, dtype = (8, 4), torch.bfloat16
    wanted = {name: torch.full(shape, ord(name), dtype=dtype) for name in "abc"}
    pending = [(name, Pending(dtype, shape, wanted[name].clone)) for name in wanted]
    with LiveCopies() as copies:
        checksum = write_tensors(tmp_path / "pending", pending)
    assert checksum == write_tensors(tmp_path / "there", wanted.items())
    assert len(copies.clones) == 3
    assert copies.most == 1
    assert same(read_tensor(tmp_path / "pending", "b"), wanted["b"])
    with pytest.raises(CheckpointError, match="cannot read"):
        read_tensor(tmp_path / "pending", "d")


@pytest.mark.parametrize("made", [torch.ones(2), torch.ones(3).half()])
def test_a_pending_tensor_that_becomes_another_is_refused(made: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a became"):
        write_tensors(tmp_path / "x", [("a", Pending(torch.float32, (3,), lambda: made))])


def test_names_twice_and_unknown_dtypes_are_refused_before_writing(tmp_path: Path) -> None:
    path = tmp_path / "none"
    with pytest.raises(ValueError, match="'a' is taken"):
        write_tensors(path, [("a", torch.ones(1)), ("a", torch.ones(2))])
    with pytest.raises(ValueError, match="'__metadata__' is taken"):
        write_tensors(path, [("__metadata__", torch.ones(1))])
    with pytest.raises(ValueError, match="z has dtype complex64"):
        write_tensors(path, [("z", torch.ones(1, dtype=torch.complex64))])
    assert not path.exists()


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_cut_file_is_told_by_its_name(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    write_tensors(path, [("a", torch.ones(64))])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        list(read_tensors(path))


def test_a_missing_file_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        list(read_tensors(tmp_path / "gone.safetensors"))


def test_an_error_of_the_reader_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    """`with` around the yield must not swallow or rename what the caller raises."""

    def copy() -> None:
        for _ in read_tensors(tmp_path / "fine"):
            raise OSError("disk full")

    write_tensors(tmp_path / "fine", [("a", torch.ones(1))])
    with pytest.raises(OSError, match="disk full"):
        copy()
