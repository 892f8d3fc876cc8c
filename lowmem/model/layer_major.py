"""An update in layer-major order: all its micro-batches through one block before the next.

    forward    embedding, block 1, ..., block L: only the inputs of blocks are kept
    turn       final norm, head and loss, forward and backward
    backward   block L, ..., block 1, embedding: each made again and taken back at once

A block's gradients are complete, and its weights may change, before those of the next begin. So
sums of one block exist at a time, whatever the number of micro-batches, and every method sees the
whole gradient of the whole batch. Sums are made in the order of the micro-batches, as elsewhere.

Source: the order is that of Pudipeddi et al. 2020 (L2L), arXiv:2002.05645.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.model.boundaries import Place
from lowmem.model.ends import (
    EMBEDDING,
    HEAD,
    KeptOfLoss,
    embedded,
    embedding_gradient,
    final_loss,
    head_gradient,
    norm_gradient,
)
from lowmem.model.sink import CountingSink
from lowmem.phases import phase

if TYPE_CHECKING:  # llama.py imports this file
    from lowmem.model.llama import Llama

MicroBatches = Iterable[tuple[Tensor, Tensor]]
_NOT_LAST = 2  # micro-batches left, where another part of the same gradient is still to come


@torch.no_grad()
def layer_major_loss(
    model: "Llama", micro_batches: MicroBatches, total_tokens: int, count: int
) -> Tensor:
    """Mean loss of an update, 0-dim float32; every gradient is with the sink when it returns.

    micro_batches: read three times. count: how many there are; all but the last are equal in size.
    """
    boundaries, blocks, sink = model.boundaries, model.blocks, model.sink
    if not isinstance(sink, CountingSink):
        raise TypeError(f"{type(sink).__name__} cannot count gradients; attach an optimizer")
    places = _through_embedding(model, micro_batches, count)
    for index, block in enumerate(blocks):
        with phase(f"forward of block {index + 1}"), model.here(index, then=index + 1):
            for place, (x,) in boundaries.read([index], places):
                boundaries.put(index + 1, place, block(x, model.rotation(place.length), "full")[0])
    total = _turn(model, sink, micro_batches, total_tokens, places)
    for index in reversed(range(len(blocks))):
        with (
            phase(f"backward of block {index + 1}"),
            model.here(index, then=index - 1, changes=True),
        ):
            for place, (x, grad) in boundaries.read([index, index + 1], places):
                sink.expect(place.left)
                kept = {"x": x}
                del x  # the block lets go of it when it can
                blocks[index].backward(grad, kept, model.rotation(place.length), model.hand)
                boundaries.put(index, place, grad)
            boundaries.close(index + 1)
    _back_through_embedding(model, sink, micro_batches, places)
    return total


def _through_embedding(model: "Llama", micro_batches: MicroBatches, count: int) -> list[Place]:
    """Fill layer 0; where the micro-batches lie in every layer."""
    ends: list[tuple[int, int]] = []
    start = 0
    with phase("embedding"):
        for inputs, _ in micro_batches:
            model.rotation(inputs.shape[1])  # made once: not at the first block's expense
            x = embedded(inputs.reshape(-1), model.model.embed_tokens.weight)
            if not ends:
                model.boundaries.begin(count * len(x), x)
            stop = start + len(x)
            model.boundaries.put(0, Place(start, stop, inputs.shape[1], 0), x)
            ends.append((stop, inputs.shape[1]))
            start = stop
    assert ends, "an update needs a micro-batch"
    starts = [0, *(stop for stop, _ in ends)]
    return [
        Place(starts[number], stop, length, len(ends) - 1 - number)
        for number, (stop, length) in enumerate(ends)
    ]


def _turn(
    model: "Llama",
    sink: CountingSink,
    micro_batches: MicroBatches,
    total_tokens: int,
    places: list[Place],
) -> Tensor:
    """The loss; layer L becomes its gradient."""
    last = len(model.blocks)
    total: Tensor | None = None
    with phase("loss"):
        read = model.boundaries.read([last], places)
        for (_, targets), (place, (x,)) in zip(micro_batches, read, strict=True):
            loss, kept = final_loss(model, x, targets.reshape(-1), 1 / total_tokens, None)
            grad = _gradient(model, sink, kept, place)
            model.boundaries.put(last, place, grad)
            total = loss if total is None else total.add_(loss)
            del loss, kept, grad
    assert total is not None
    return total


def _gradient(model: "Llama", sink: CountingSink, kept: KeptOfLoss, place: Place) -> Tensor:
    """That of the last block's output; those of head and norm are handed over."""
    tied = model.config.tie_word_embeddings

    def take(start: int, rows: Tensor) -> None:
        model.hand_rows(EMBEDDING if tied else HEAD, start, rows)

    # A tied head's gradient is only a part: the embedding's comes at the very end.
    sink.expect(place.left + (_NOT_LAST if tied else 0))
    with phase("gradient of head"):
        grad = head_gradient(model, kept, take).to(kept.x.dtype)
    sink.expect(place.left)
    with phase("gradient of norm"):
        return norm_gradient(model, kept, grad)


def _back_through_embedding(
    model: "Llama", sink: CountingSink, micro_batches: MicroBatches, places: list[Place]
) -> None:
    def take(start: int, rows: Tensor) -> None:
        model.hand_rows(EMBEDDING, start, rows)

    with phase("gradient of embedding"):
        read = model.boundaries.read([0], places)
        for (inputs, _), (place, (grad,)) in zip(micro_batches, read, strict=True):
            sink.expect(place.left)
            embedding_gradient(model, inputs.reshape(-1), grad, take)
        model.boundaries.close(0)
