"""An example of every kernel: what `lowmem doctor --kernels`, `lowmem bench kernels` and the tests
run. A new operator's stand in `<operator>_examples.py` beside it and are listed here.
"""

from lowmem.kernels import (
    adam8_examples,
    blockwise_examples,
    drawn_projection_examples,
    groupwise_examples,
    int8_linear_examples,
    limited_scales_examples,
    newton_schulz_examples,
    random_normal_examples,
    rms_norm_examples,
    rope_examples,
    rounding_examples,
    scaled_matmul_examples,
    scaled_write_examples,
    swiglu_examples,
    unproject_write_examples,
)

EXAMPLES = [
    *blockwise_examples.EXAMPLES,
    *adam8_examples.EXAMPLES,
    *rounding_examples.EXAMPLES,
    *groupwise_examples.EXAMPLES,
    *int8_linear_examples.EXAMPLES,
    *scaled_matmul_examples.EXAMPLES,
    *newton_schulz_examples.EXAMPLES,
    *unproject_write_examples.EXAMPLES,
    *random_normal_examples.EXAMPLES,
    *drawn_projection_examples.EXAMPLES,
    *limited_scales_examples.EXAMPLES,
    *scaled_write_examples.EXAMPLES,
    *rms_norm_examples.EXAMPLES,
    *swiglu_examples.EXAMPLES,
    *rope_examples.EXAMPLES,
]
