"""Up to how many tokens a product with a weight in codes reads the codes.

A program of the kernel makes floats for its own tile of tokens: many tokens make them many times
over, where by slices of the weight they are made once. Few tokens wait for the weight, of which
codes are a fifth of what a slice costs: codes read, floats written, floats read.
"""

MOST_TOKENS = 256
"""By roofline both ways take as long at about 450 tokens (A100, RTX 4090, H200; 0.5 of the peak in
the kernel, 0.8 in cuBLAS). Not measured on a card yet: `lowmem bench kernels` does it."""


def reads_codes(tokens: float) -> bool:
    """Are there so few that codes are multiplied as they are, where there is a kernel for it?"""
    return tokens <= MOST_TOKENS
