// Blockwise 8-bit codes and Adam on them, for a CPU: the arithmetic of blockwise.py and adam8.py
// operation by operation, each rounded as PyTorch rounds it, in one pass over memory.
//
// Loops over one block stand apart on purpose: those without a table lookup become vector code.
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int64_t BLOCK = 256;
constexpr float TINY = 1e-38f;      // divisor of an all-zero block
constexpr int32_t ONE = 0x3F800000;
constexpr int32_t FIRST = 0x34000000;  // bits of 2^-23; below it no code changes
constexpr int32_t SIDE = ((ONE - FIRST) >> 16) + 1;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

void decode(const uint8_t* codes, int64_t n, const float* values, float scale, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = values[codes[i]] * scale;
}

float largest(const float* x, int64_t n) {
    int32_t most = 0;  // as integers, so that NaN is the largest of all
    for (int64_t i = 0; i < n; i++) {
        const int32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        most = magnitude > most ? magnitude : most;
    }
    float found;
    memcpy(&found, &most, 4);
    return found;
}

void encode(const float* x, int64_t n, const int32_t* table, bool lift, uint8_t* codes,
            float* absmax) {
    float scaled[BLOCK];
    int32_t at[BLOCK], found[BLOCK];
    float scale = largest(x, n);
    const float divisor = scale < TINY ? TINY : scale;
    if (n == BLOCK) {
        const float inverse = 1.0f / divisor;
        for (int64_t i = 0; i < n; i++) scaled[i] = x[i] * inverse;
    } else {
        for (int64_t i = 0; i < n; i++) scaled[i] = x[i] / divisor;
        scale = divisor;
    }
    *absmax = scale;
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = bits_of(scaled[i]);
        int32_t magnitude = bits & 0x7FFFFFFF;
        magnitude = magnitude > ONE ? ONE : magnitude;
        const int32_t above = magnitude < FIRST ? 0 : magnitude - FIRST;
        at[i] = (above >> 16) + ((bits >> 31) & SIDE);
    }
    for (int64_t i = 0; i < n; i++) found[i] = table[at[i]];
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = bits_of(scaled[i]);
        int32_t magnitude = bits & 0x7FFFFFFF;
        magnitude = magnitude > ONE ? ONE : magnitude;
        const int32_t negative = bits >> 31;
        const int32_t beyond = (magnitude & 0xFFFF) > (found[i] & 0xFFFF) ? 1 : 0;
        int32_t code = (found[i] >> 16) + (beyond ^ negative) - negative;
        code += lift & (code == 0) & (x[i] > 0.0f);
        codes[i] = (uint8_t)code;
    }
}

}  // namespace

extern "C" {

void blockwise_quantize(const float* x, const int32_t* table, uint8_t* codes, float* absmax,
                        bool lift, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t n = least(BLOCK, count - start);
        encode(x + start, n, table, lift, codes + start, absmax + start / BLOCK);
    }
}

void blockwise_dequantize(const uint8_t* codes, const float* absmax, const float* values,
                          float* out, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += BLOCK)
        decode(codes + start, least(BLOCK, count - start), values, absmax[start / BLOCK],
               out + start);
}

void adam8(const float* gradient, float* target, uint8_t* codes1, float* absmax1,
           const float* values1, const int32_t* table1, uint8_t* codes2, float* absmax2,
           const float* values2, const int32_t* table2, double alpha, double scale, double beta1,
           double beta2, double eps, bool lift, int64_t count, int threads) {
    const float keep1 = (float)beta1, keep2 = (float)beta2, small = (float)eps;
    const float take1 = (float)(1 - beta1), take2 = (float)(1 - beta2);
    const float factor = (float)scale, weight = (float)alpha;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t n = least(BLOCK, count - start), block = start / BLOCK;
        const float* g = gradient + start;
        float* w = target + start;
        float m[BLOCK], v[BLOCK];
        decode(codes1 + start, n, values1, absmax1[block], m);
        decode(codes2 + start, n, values2, absmax2[block], v);
        for (int64_t i = 0; i < n; i++) {
            m[i] = __builtin_fmaf(g[i], take1, m[i] * keep1);
            v[i] = __builtin_fmaf(g[i] * take2, g[i], v[i] * keep2);
            const float moved = m[i] / (__builtin_sqrtf(v[i]) + small) * factor;
            w[i] = __builtin_fmaf(moved, weight, w[i]);
        }
        encode(m, n, table1, false, codes1 + start, absmax1 + block);
        encode(v, n, table2, lift, codes2 + start, absmax2 + block);
    }
}

}
