// Rounding to bfloat16 and normal numbers for a CPU, from the hash of rounding.py: element by
// element what random_normal.py and rounding.py make in many passes.
#include <stdint.h>
#include <string.h>

namespace {

constexpr int64_t PIECE = 16384;  // elements of a thread's turn, even

// The 32 bits of an index; low, high: of the seed.
inline uint32_t hashed(uint32_t index, uint32_t low, uint32_t high) {
    uint32_t x = index ^ low;
    x = (x ^ (x >> 16)) * 0x7FEB352Du + high;
    x = (x ^ (x >> 15)) * 0x846CA68Bu + high;
    return x ^ (x >> 16);
}

int64_t end_of(int64_t start, int64_t count) {
    return start + PIECE < count ? start + PIECE : count;
}

}  // namespace

extern "C" {

void round_bf16(const float* x, uint16_t* out, int64_t low, int64_t high, int64_t offset,
                int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += PIECE)
        for (int64_t i = start; i < end_of(start, count); i++) {
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            const uint32_t noise =
                hashed((uint32_t)i + (uint32_t)offset, (uint32_t)low, (uint32_t)high) & 0xFFFFu;
            // NaN and infinity take no noise.
            const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
            out[i] = (uint16_t)((bits + (finite ? noise : 0u)) >> 16);
        }
}

// table: 65536 quantiles. pair: the first index, of two numbers.
void random_normal(float* out, const float* table, int64_t low, int64_t high, int64_t pair,
                   int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += PIECE) {
        const int64_t end = end_of(start, count);
        for (int64_t i = start; i + 1 < end; i += 2) {
            const uint32_t bits = hashed((uint32_t)(i / 2 + pair), (uint32_t)low, (uint32_t)high);
            out[i] = table[bits & 0xFFFFu];
            out[i + 1] = table[bits >> 16];
        }
        if (end % 2)
            out[end - 1] = table[hashed((uint32_t)(end / 2 + pair), (uint32_t)low, (uint32_t)high) &
                                 0xFFFFu];
    }
}

}
