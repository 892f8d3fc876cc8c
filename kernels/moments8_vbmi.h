// Whole blocks of moments8.cpp with AVX-512 VBMI: a lookup in 256 numbers is a permutation of bytes
// in registers, 64 at a time, instead of 64 loads.
//
// The code of a number comes in two steps. Its position among the codes is about linear between two
// powers of ten, which gives a code that is right or one too low; the exact midpoint above that one
// decides, as everywhere else.
#include <immintrin.h>

namespace vbmi {

// A number is one of 64. Turned: 4 x 4 groups of 4 are transposed, the order in which bytes that
// are interleaved within 128 bits become four vectors of consecutive numbers.
inline __m512i turned(__m512i bytes) {
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, bytes);
}

struct Four {
    __m512 at[4];
};

// 256 float32, their bytes apart: first the lowest of all.
struct Planes {
    alignas(64) uint8_t bytes[4][BLOCK];

    explicit Planes(const float* numbers) {
        for (int place = 0; place < 4; place++)
            for (int i = 0; i < BLOCK; i++)
                bytes[place][i] = (uint8_t)(bits_of(numbers[i]) >> (8 * place));
    }

    __m512i plane(int place, __m512i index, __mmask64 upper) const {
        const __m512i* half = (const __m512i*)bytes[place];
        const __m512i low = _mm512_permutex2var_epi8(half[0], index, half[1]);
        const __m512i high = _mm512_permutex2var_epi8(half[2], index, half[3]);
        return _mm512_mask_blend_epi8(upper, low, high);
    }

    // index: 64 codes, turned. The result is in their order before that.
    Four look_up(__m512i index) const {
        const __mmask64 upper = _mm512_movepi8_mask(index);
        const __m512i a = plane(0, index, upper), b = plane(1, index, upper);
        const __m512i c = plane(2, index, upper), d = plane(3, index, upper);
        const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
        const __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
        return {{_mm512_castsi512_ps(_mm512_unpacklo_epi16(ab0, cd0)),
                 _mm512_castsi512_ps(_mm512_unpackhi_epi16(ab0, cd0)),
                 _mm512_castsi512_ps(_mm512_unpacklo_epi16(ab1, cd1)),
                 _mm512_castsi512_ps(_mm512_unpackhi_epi16(ab1, cd1))}};
    }
};

// Midpoints of neighbours; nothing is beyond the last.
struct Middles {
    float numbers[BLOCK];

    explicit Middles(const float* values) {
        for (int i = 0; i + 1 < BLOCK; i++) numbers[i] = (values[i] + values[i + 1]) / 2;
        numbers[BLOCK - 1] = __builtin_inff();
    }
};

// About where a magnitude is among the codes: first[d] + slope[d] * magnitude in decade d, from
// 10^(d - 7) to 10^(d - 6). It is a quarter of a code off at most, where two decades meet.
struct Decades {
    static constexpr int32_t LEAST = 103;  // exponent (biased) of 2^-24, in the first decade
    alignas(64) float slope[16] = {}, first[16] = {};
    // By exponent: what to add to the bits of a magnitude so that its decade is above bit 23.
    alignas(64) int32_t added[32] = {};

    explicit Decades(bool with_sign) {
        double end = 1e-6;
        for (int decade = 0; decade < 7; decade++, end *= 10) {
            const double cells = with_sign ? 1 << decade : 2 << decade;
            const double begins = with_sign ? cells : cells - 1;  // its first code, from that of 0
            slope[decade] = (float)(cells / 0.9 / end);
            // Half a code less, so that errors do not reach the next.
            first[decade] = (float)(begins - cells / 9 - 0.5);
        }
        for (int32_t exponent = LEAST; exponent < 128; exponent++) {
            int32_t decade = 0, carry = 0;
            for (float edge = 1e-6f; edge < 0.5f; edge *= 10.0f) {
                const int32_t at = bits_of(edge), octave = at >> 23;
                decade += octave < exponent;
                if (octave == exponent) carry = (1 << 23) - (at & 0x7FFFFF);
            }
            added[exponent & 31] = (int32_t)((uint32_t)(decade - exponent) << 23) + carry;
        }
    }
};

struct Map {
    Planes values, middles;
    Decades decades;
    bool with_sign;

    explicit Map(const float* numbers)
        : values(numbers), middles(Middles(numbers).numbers), decades(numbers[0] < 0.0f),
          with_sign(numbers[0] < 0.0f) {}
};

inline void decode(const uint8_t* codes, const Map& map, float scale, float* out) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int i = 0; i < BLOCK; i += 64) {
        const Four found = map.values.look_up(turned(_mm512_loadu_si512(codes + i)));
        for (int j = 0; j < 4; j++)
            _mm512_storeu_ps(out + i + 16 * j, _mm512_mul_ps(found.at[j], factor));
    }
}

// Which of four times 16 numbers, as one mask.
inline __mmask64 joined(__mmask16 a, __mmask16 b, __mmask16 c, __mmask16 d) {
    return _mm512_kunpackd(_mm512_kunpackw(d, c), _mm512_kunpackw(b, a));
}

inline __mmask64 larger(const __m512* x, const Four& than) {
    return joined(_mm512_cmp_ps_mask(x[0], than.at[0], _CMP_GT_OQ),
                  _mm512_cmp_ps_mask(x[1], than.at[1], _CMP_GT_OQ),
                  _mm512_cmp_ps_mask(x[2], than.at[2], _CMP_GT_OQ),
                  _mm512_cmp_ps_mask(x[3], than.at[3], _CMP_GT_OQ));
}

// Numbers within [-1, 1] to codes.
template <bool SIGN>
struct Encoder {
    const Map& map;
    __m512i added0 = _mm512_load_si512(map.decades.added);
    __m512i added1 = _mm512_load_si512(map.decades.added + 16);
    __m512 slopes = _mm512_load_ps(map.decades.slope), firsts = _mm512_load_ps(map.decades.first);

    // A position is rounded down: of a magnitude to the code or the one below, of a negative number
    // (its position negated) to as many codes below that of zero, less one.
    __m512i position(__m512 x) const {
        const __m512i sign = _mm512_set1_epi32((int32_t)0x80000000);
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i magnitude = _mm512_max_epi32(SIGN ? _mm512_andnot_si512(sign, bits) : bits,
                                                   _mm512_set1_epi32(Decades::LEAST << 23));
        const __m512i exponent = _mm512_srli_epi32(magnitude, 23);
        const __m512i sum =
            _mm512_add_epi32(magnitude, _mm512_permutex2var_epi32(added0, exponent, added1));
        const __m512i decade = _mm512_srli_epi32(sum, 23);
        __m512 first = _mm512_permutexvar_ps(decade, firsts);
        if (SIGN)  // first ^ (x & sign)
            first = _mm512_castsi512_ps(
                _mm512_ternarylogic_epi32(_mm512_castps_si512(first), bits, sign, 0x78));
        const __m512 slope = _mm512_permutexvar_ps(decade, slopes);
        return _mm512_cvt_roundps_epi32(_mm512_fmadd_ps(x, slope, first),
                                        _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    }

    // Of 64 numbers x / scale.
    __m512i operator()(const __m512* scaled) const {
        const __m512i half0 = _mm512_packs_epi32(position(scaled[0]), position(scaled[1]));
        const __m512i half1 = _mm512_packs_epi32(position(scaled[2]), position(scaled[3]));
        __m512i code;  // turned
        if (SIGN)      // -128 to 127 become 0 (twice) to 254
            code = _mm512_subs_epu8(_mm512_xor_si512(_mm512_packs_epi16(half0, half1),
                                                     _mm512_set1_epi8((char)0x80)),
                                    _mm512_set1_epi8(1));
        else
            code = _mm512_packus_epi16(half0, half1);
        const __mmask64 beyond = larger(scaled, map.middles.look_up(code));
        code = turned(code);  // twice is as before
        return _mm512_mask_add_epi8(code, beyond, code, _mm512_set1_epi8(1));
    }
};

// A positive number never gets code 0. x: not scaled, where it might have become 0.
inline __m512i lifted(__m512i code, const __m512* x) {
    if (_mm512_test_epi8_mask(code, code) == ~(__mmask64)0) return code;
    const __m512 zero = _mm512_setzero_ps();
    const __mmask64 positive = larger(x, {{zero, zero, zero, zero}});
    return _mm512_mask_max_epu8(code, positive, code, _mm512_set1_epi8(1));
}

template <bool SIGN>
inline void encode_all(const float* x, const Map& map, float inverse, bool lift, uint8_t* codes) {
    const Encoder<SIGN> encoder{map};
    const __m512 factor = _mm512_set1_ps(inverse);
    for (int i = 0; i < BLOCK; i += 64) {
        __m512 exact[4], scaled[4];
        for (int j = 0; j < 4; j++) {
            exact[j] = _mm512_loadu_ps(x + i + 16 * j);
            scaled[j] = _mm512_mul_ps(exact[j], factor);
        }
        const __m512i code = encoder(scaled);
        _mm512_storeu_si512(codes + i, lift ? lifted(code, exact) : code);
    }
}

// inverse: of the block's largest magnitude, which is finite.
inline void encode(const float* x, const Map& map, float inverse, bool lift, uint8_t* codes) {
    if (map.with_sign)
        encode_all<true>(x, map, inverse, lift, codes);
    else
        encode_all<false>(x, map, inverse, lift, codes);
}

// A block of Adam's step, in the arithmetic of `Adam` in moments8.cpp. The moments are read and
// moved first; then square roots and divisions, which have a unit of their own, run beside the
// permutations of encoding. False, with nothing written: a moment is not finite.
inline bool adam8(const float* g, float* w, uint8_t* codes1, float* absmax1, const Map& map1,
                  uint8_t* codes2, float* absmax2, const Map& map2, const Step& step) {
    alignas(64) float m[BLOCK], v[BLOCK];
    const __m512 keep1 = _mm512_set1_ps(step.keep1), keep2 = _mm512_set1_ps(step.keep2);
    const __m512 take1 = _mm512_set1_ps(step.take1), take2 = _mm512_set1_ps(step.take2);
    const __m512 before1 = _mm512_set1_ps(*absmax1), before2 = _mm512_set1_ps(*absmax2);
    __m512i most1 = _mm512_setzero_si512(), most2 = most1;  // as integers: NaN is the largest
    for (int i = 0; i < BLOCK; i += 64) {
        const Four old1 = map1.values.look_up(turned(_mm512_loadu_si512(codes1 + i)));
        const Four old2 = map2.values.look_up(turned(_mm512_loadu_si512(codes2 + i)));
        for (int j = 0; j < 4; j++) {
            const __m512 gradient = _mm512_loadu_ps(g + i + 16 * j);
            const __m512 first = _mm512_fmadd_ps(
                gradient, take1, _mm512_mul_ps(_mm512_mul_ps(old1.at[j], before1), keep1));
            const __m512 second =
                _mm512_fmadd_ps(_mm512_mul_ps(gradient, take2), gradient,
                                _mm512_mul_ps(_mm512_mul_ps(old2.at[j], before2), keep2));
            _mm512_store_ps(m + i + 16 * j, first);
            _mm512_store_ps(v + i + 16 * j, second);
            most1 = _mm512_max_epi32(most1, _mm512_castps_si512(_mm512_abs_ps(first)));
            most2 = _mm512_max_epi32(most2, _mm512_castps_si512(_mm512_abs_ps(second)));
        }
    }
    const float scale1 = float_of(_mm512_reduce_max_epi32(most1));
    const float scale2 = float_of(_mm512_reduce_max_epi32(most2));
    if (!(scale1 < __builtin_inff() && scale2 < __builtin_inff())) return false;
    *absmax1 = scale1;
    *absmax2 = scale2;
    const Encoder<true> encoder1{map1};
    const Encoder<false> encoder2{map2};
    const __m512 inverse1 = _mm512_set1_ps(1.0f / (scale1 < TINY ? TINY : scale1));
    const __m512 inverse2 = _mm512_set1_ps(1.0f / (scale2 < TINY ? TINY : scale2));
    const __m512 small = _mm512_set1_ps(step.small), factor = _mm512_set1_ps(step.factor);
    const __m512 weight = _mm512_set1_ps(step.weight);
    for (int i = 0; i < BLOCK; i += 64) {
        __m512 first[4], second[4], scaled1[4], scaled2[4];
        for (int j = 0; j < 4; j++) {
            first[j] = _mm512_load_ps(m + i + 16 * j);
            second[j] = _mm512_load_ps(v + i + 16 * j);
            scaled1[j] = _mm512_mul_ps(first[j], inverse1);
            scaled2[j] = _mm512_mul_ps(second[j], inverse2);
            const __m512 below = _mm512_add_ps(_mm512_sqrt_ps(second[j]), small);
            const __m512 moved = _mm512_mul_ps(_mm512_div_ps(first[j], below), factor);
            float* target = w + i + 16 * j;
            _mm512_storeu_ps(target, _mm512_fmadd_ps(moved, weight, _mm512_loadu_ps(target)));
        }
        _mm512_storeu_si512(codes1 + i, encoder1(scaled1));
        const __m512i code2 = encoder2(scaled2);
        _mm512_storeu_si512(codes2 + i, step.lift ? lifted(code2, second) : code2);
    }
    return true;
}

}  // namespace vbmi
