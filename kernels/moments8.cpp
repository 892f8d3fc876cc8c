// Blockwise 8-bit codes and Adam on them, for a CPU: the arithmetic of blockwise.py and adam8.py
// operation by operation, each rounded as PyTorch rounds it, in one pass over memory.
//
// Loops over one block stand apart on purpose: those without a table lookup become vector code.
// With AVX-512 VBMI lookups are permutations of bytes in registers (moments8_vbmi.h); both ways
// give the same bits.
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int BLOCK = 256;
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

float float_of(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// What a step of Adam is made with, in float32.
struct Step {
    float keep1, take1, keep2, take2, small, factor, weight;
    bool lift;
};

}  // namespace

#if defined(__AVX512VBMI__) && defined(__AVX512DQ__) && !defined(LOWMEM_PORTABLE)
#define LOWMEM_VBMI
#include "moments8_vbmi.h"
#endif

namespace {

// The 256 values of a map, ascending, and the code of every bucket: `code_table` in blockwise.py.
struct Map {
    const float* values;
    const int32_t* table;
#ifdef LOWMEM_VBMI
    vbmi::Map in_registers{values};
#endif
};

void decode(const uint8_t* codes, int64_t n, const Map& map, float scale, float* out) {
#ifdef LOWMEM_VBMI
    if (n == BLOCK) return vbmi::decode(codes, map.in_registers, scale, out);
#endif
    for (int64_t i = 0; i < n; i++) out[i] = map.values[codes[i]] * scale;
}

float largest(const float* x, int64_t n) {
    int32_t most = 0;  // as integers, so that NaN is the largest of all
    for (int64_t i = 0; i < n; i++) {
        const int32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        most = magnitude > most ? magnitude : most;
    }
    return float_of(most);
}

void encode(const float* x, int64_t n, const Map& map, bool lift, uint8_t* codes, float* absmax) {
    float scaled[BLOCK];
    int32_t at[BLOCK], found[BLOCK];
    float scale = largest(x, n);
    const float divisor = scale < TINY ? TINY : scale;
    if (n == BLOCK) {
        const float inverse = 1.0f / divisor;
#ifdef LOWMEM_VBMI
        if (scale < __builtin_inff()) {  // it is no NaN either
            *absmax = scale;
            return vbmi::encode(x, map.in_registers, inverse, lift, codes);
        }
#endif
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
    for (int64_t i = 0; i < n; i++) found[i] = map.table[at[i]];
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

void blockwise_quantize(const float* x, const float* values, const int32_t* table, uint8_t* codes,
                        float* absmax, bool lift, int64_t count, int threads) {
    const Map map{values, table};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t n = least(BLOCK, count - start);
        encode(x + start, n, map, lift, codes + start, absmax + start / BLOCK);
    }
}

void blockwise_dequantize(const uint8_t* codes, const float* absmax, const float* values,
                          float* out, int64_t count, int threads) {
    const Map map{values, nullptr};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += BLOCK)
        decode(codes + start, least(BLOCK, count - start), map, absmax[start / BLOCK],
               out + start);
}

void adam8(const float* gradient, float* target, uint8_t* codes1, float* absmax1,
           const float* values1, const int32_t* table1, uint8_t* codes2, float* absmax2,
           const float* values2, const int32_t* table2, double alpha, double scale, double beta1,
           double beta2, double eps, bool lift, int64_t count, int threads) {
    const Step step{(float)beta1, (float)(1 - beta1), (float)beta2, (float)(1 - beta2), (float)eps,
                    (float)scale, (float)alpha, lift};
    const Map map1{values1, table1}, map2{values2, table2};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t n = least(BLOCK, count - start), block = start / BLOCK;
        const float* g = gradient + start;
        float* w = target + start;
#ifdef LOWMEM_VBMI
        if (n == BLOCK && vbmi::adam8(g, w, codes1 + start, absmax1 + block, map1.in_registers,
                                      codes2 + start, absmax2 + block, map2.in_registers, step))
            continue;
#endif
        float m[BLOCK], v[BLOCK];
        decode(codes1 + start, n, map1, absmax1[block], m);
        decode(codes2 + start, n, map2, absmax2[block], v);
        for (int64_t i = 0; i < n; i++) {
            m[i] = __builtin_fmaf(g[i], step.take1, m[i] * step.keep1);
            v[i] = __builtin_fmaf(g[i] * step.take2, g[i], v[i] * step.keep2);
            const float moved = m[i] / (__builtin_sqrtf(v[i]) + step.small) * step.factor;
            w[i] = __builtin_fmaf(moved, step.weight, w[i]);
        }
        encode(m, n, map1, false, codes1 + start, absmax1 + block);
        encode(v, n, map2, lift, codes2 + start, absmax2 + block);
    }
}

}
