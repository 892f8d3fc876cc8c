"""The orders of blocks as the released code of FRUGAL walks them: a pointer that moves on."""


def walked(order: str, count: int, share: int, turn: int) -> list[int]:
    """Active matrices of that turn, from 0. order: ascending, descending or mirror."""
    half, pointer = count // 2, count - 1 if order == "descending" else 0
    for _ in range(turn):
        match order:
            case "ascending":
                pointer += share
                pointer -= count if pointer >= count else 0
            case "descending":
                pointer -= share
                pointer += count if pointer < 0 else 0
            case "mirror":
                pointer += share // 2
                pointer -= half if pointer >= half else 0
    match order:
        case "ascending":
            return [(pointer + i) % count for i in range(share)]
        case "descending":
            return [(pointer - i) % count for i in range(share)]
    near = [i % half for i in range(pointer, pointer + share // 2)]
    return [*near, *(count - 1 - i for i in near)]
