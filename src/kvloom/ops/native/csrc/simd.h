// Sixteen floats at a time, in GCC's vector extensions, and the few instructions they lack.
//
// Knows: one CPU level, the one it is compiled for. Does not know: what is computed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LEVEL_AVX512 1
#define LEVEL_NAME "avx512"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LEVEL_AVX2 1
#define LEVEL_NAME "avx2"
#else
#define LEVEL_NAME "plain"
#endif

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
static const int LANES = 16;
static const float NEVER = -1e30f;  // minus infinity turns into NaN where a row sees nothing

template <class V, class T> INLINE V load(const T *p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}
template <class V, class T> INLINE void store(T *p, const V &v) { std::memcpy(p, &v, sizeof(V)); }

INLINE Floats as_floats(Words x) { return (Floats)x; }
INLINE Words as_words(Floats x) { return (Words)x; }
typedef int8_t Smalls __attribute__((vector_size(16)));

// What GCC takes apart lane by lane where a vector is wider than the registers.
#if LEVEL_AVX2
INLINE __m256 half_of(const Floats &v, int half) { return _mm256_loadu_ps((const float *)&v + 8 * half); }
INLINE __m256i half_of(const Ints &v, int half) { return _mm256_loadu_si256((const __m256i *)&v + half); }
INLINE __m256i half_of(const Words &v, int half) { return _mm256_loadu_si256((const __m256i *)&v + half); }
INLINE __m256i half_of(const Bytes &v, int half) { return _mm256_loadu_si256((const __m256i *)&v + half); }
template <class V, class H> INLINE V joined(H low, H high) {
    V v;
    std::memcpy(&v, &low, 32);
    std::memcpy((char *)&v + 32, &high, 32);
    return v;
}
// Calls a function of halves on both halves of the arguments.
template <class V, class Work, class... Args> INLINE V by_halves(Work work, const Args &...args) {
    return joined<V>(work(half_of(args, 0)...), work(half_of(args, 1)...));
}
INLINE Floats splat(float x) { return joined<Floats>(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE Ints splat_int(int32_t x) { return joined<Ints>(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE Floats product(Floats a, Floats b) {
    return by_halves<Floats>([](__m256 x, __m256 y) { return _mm256_mul_ps(x, y); }, a, b);
}
INLINE Floats difference(Floats a, Floats b) {
    return by_halves<Floats>([](__m256 x, __m256 y) { return _mm256_sub_ps(x, y); }, a, b);
}
INLINE Floats quotient(Floats a, Floats b) {
    return by_halves<Floats>([](__m256 x, __m256 y) { return _mm256_div_ps(x, y); }, a, b);
}
INLINE Floats to_floats(Ints x) {
    return by_halves<Floats>([](__m256i h) { return _mm256_cvtepi32_ps(h); }, x);
}
INLINE Ints to_ints(Floats x) {
    return by_halves<Ints>([](__m256 h) { return _mm256_cvttps_epi32(h); }, x);
}
INLINE Floats larger(Floats a, Floats b) {
    return by_halves<Floats>([](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, a, b);
}
INLINE Floats smaller(Floats a, Floats b) {
    return by_halves<Floats>([](__m256 x, __m256 y) { return _mm256_min_ps(x, y); }, a, b);
}
INLINE Ints larger_int(Ints a, Ints b) {
    return by_halves<Ints>([](__m256i x, __m256i y) { return _mm256_max_epi32(x, y); }, a, b);
}
INLINE Ints is_above(Ints a, Ints b) {
    return by_halves<Ints>([](__m256i x, __m256i y) { return _mm256_cmpgt_epi32(x, y); }, a, b);
}
INLINE Ints is_below(Floats a, Floats b) {
    auto work = [](__m256 x, __m256 y) { return _mm256_castps_si256(_mm256_cmp_ps(x, y, _CMP_LT_OQ)); };
    return by_halves<Ints>(work, a, b);
}
INLINE Smalls to_smalls(Ints x) {
    __m256i words = _mm256_packs_epi32(half_of(x, 0), half_of(x, 1));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    return (Smalls)_mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
INLINE Ints from_smalls(Smalls x) {
    const __m128i low = (__m128i)x, high = _mm_unpackhi_epi64(low, low);
    return joined<Ints>(_mm256_cvtepi8_epi32(low), _mm256_cvtepi8_epi32(high));
}
INLINE Halves upper_halves(Words x) {
    __m256i low = _mm256_srli_epi32(half_of(x, 0), 16), high = _mm256_srli_epi32(half_of(x, 1), 16);
    return (Halves)_mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}
INLINE void split_nibbles(Bytes both, Bytes &low, Bytes &high) {
    const __m256i mask = _mm256_set1_epi8(15);
    low = by_halves<Bytes>([=](__m256i h) { return _mm256_and_si256(h, mask); }, both);
    auto upper = [=](__m256i h) { return _mm256_and_si256(_mm256_srli_epi16(h, 4), mask); };
    high = by_halves<Bytes>(upper, both);
}
#else
INLINE Floats splat(float x) { return Floats{} + x; }
INLINE Ints splat_int(int32_t x) { return Ints{} + x; }
INLINE Floats product(Floats a, Floats b) { return a * b; }
INLINE Floats difference(Floats a, Floats b) { return a - b; }
INLINE Floats quotient(Floats a, Floats b) { return a / b; }
INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
INLINE Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
INLINE Ints larger_int(Ints a, Ints b) { return a > b ? a : b; }
INLINE Ints is_above(Ints a, Ints b) { return a > b; }
INLINE Ints is_below(Floats a, Floats b) { return a < b; }
INLINE Smalls to_smalls(Ints x) { return __builtin_convertvector(x, Smalls); }
INLINE Ints from_smalls(Smalls x) { return __builtin_convertvector(x, Ints); }
INLINE Halves upper_halves(Words x) { return __builtin_convertvector(x >> 16, Halves); }
INLINE void split_nibbles(Bytes both, Bytes &low, Bytes &high) {
    low = both & 15;
    high = (Bytes)((Words)both >> 4) & 15;
}
#endif
// a where the mask's lane is -1, b where it is 0.
INLINE Floats chosen(Ints mask, Floats a, Floats b) { return (Floats)((mask & (Ints)a) | (~mask & (Ints)b)); }

INLINE Ints lane_numbers() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if LEVEL_AVX512
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LEVEL_AVX2
    return by_halves<Floats>([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
#else
    return a * b + c;
#endif
}

INLINE float sum(Floats v) {
#if LEVEL_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

INLINE int32_t sum_of_ints(Ints v) {
#if LEVEL_AVX512
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

INLINE float largest(Floats v) {
#if LEVEL_AVX512
    return _mm512_reduce_max_ps((__m512)v);
#else
    float s = v[0];
    for (int i = 1; i < LANES; i++) s = v[i] > s ? v[i] : s;
    return s;
#endif
}

// The largest magnitude, compared as integers: NaN is above all numbers, so that it is not lost.
INLINE float largest_magnitude(Floats a, Floats b) {
    Ints x = (Ints)as_words(a) & 0x7fffffff, y = (Ints)as_words(b) & 0x7fffffff;
    Ints v = larger_int(x, y);
#if LEVEL_AVX512
    int32_t most = _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
#endif
    float magnitude;
    std::memcpy(&magnitude, &most, 4);
    return magnitude;
}

INLINE Floats from_fp16(const uint16_t *p) {
#if LEVEL_AVX512
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif LEVEL_AVX2
    Floats v;
    __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)));
    std::memcpy(&v, &low, 32);
    std::memcpy((char *)&v + 32, &high, 32);
    return v;
#else
    // The exponent is rebiased by a product, which is right for subnormals too; no infinities here.
    Words h = __builtin_convertvector(load<Halves>(p), Words);
    Floats magnitude = as_floats((h & 0x7fffu) << 13) * 5.192296858534828e33f;
    return as_floats(as_words(magnitude) | ((h & 0x8000u) << 16));
#endif
}

// Rounds to the nearest bfloat16, ties to even; the same bits at every level.
INLINE uint16_t to_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
INLINE float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
INLINE uint32_t bf16_pair(float low, float high) {
    return (uint32_t)to_bf16(low) | ((uint32_t)to_bf16(high) << 16);
}
INLINE Words round_bf16(Floats x) {  // in the upper half of each lane
    Words u = as_words(x);
    return (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
}

// Rounds sixteen values and stores them as neighbouring bfloat16: pairs, the first one low.
INLINE void store_bf16(void *p, Floats x) {
    store((uint16_t *)p, upper_halves(round_bf16(x)));
}

// Turns int8 codes, a whole number of pairs of vectors, into the bfloat16 that they equal.
INLINE void codes_to_bf16(const int8_t *codes, int64_t count, uint16_t *out) {
#if LEVEL_AVX512  // GCC takes the conversion of 16 bytes to 16 integers apart
    __m512i uppers;  // the upper half of each of 32 floats
    for (int i = 0; i < 32; i++) ((uint16_t *)&uppers)[i] = (uint16_t)(2 * i + 1);
    for (int64_t i = 0; i < count; i += 2 * LANES) {
        const __m128i *from = (const __m128i *)(codes + i);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
        const __m512i both = _mm512_permutex2var_epi16(_mm512_castps_si512(low), uppers, _mm512_castps_si512(high));
        _mm512_storeu_si512(out + i, both);
    }
#else
    for (int64_t i = 0; i < count; i += LANES)
        store(out + i, upper_halves(as_words(to_floats(from_smalls(load<Smalls>(codes + i))))));
#endif
}

// acc + a.low * b.low + a.high * b.high for pairs of bfloat16.
INLINE Floats pair_product(Floats acc, uint32_t a, Words b) {
#if LEVEL_AVX512 && defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    Floats low = as_floats(b << 16), high = as_floats(b & 0xffff0000u);
    acc = multiply_add(splat(from_bf16((uint16_t)a)), low, acc);
    return multiply_add(splat(from_bf16((uint16_t)(a >> 16))), high, acc);
#endif
}

// exp, relative error below 3e-7; 0 below the smallest normal number.
// Source: Cody & Waite range reduction with a Taylor polynomial of degree 6.
INLINE Floats exponential(Floats x) {
    const float magic = 12582912.0f;
    Floats clamped = smaller(larger(x, splat(-87.3f)), splat(88.3f));
    Floats n = difference(multiply_add(clamped, splat(1.44269504f), splat(magic)), splat(magic));
    Floats r = multiply_add(n, splat(-0.693359375f), clamped);
    r = multiply_add(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.0f / 720.0f);
    p = multiply_add(p, r, splat(1.0f / 120.0f));
    p = multiply_add(p, r, splat(1.0f / 24.0f));
    p = multiply_add(p, r, splat(1.0f / 6.0f));
    p = multiply_add(p, r, splat(0.5f));
    p = multiply_add(p, r, splat(1.0f));
    p = multiply_add(p, r, splat(1.0f));
    Ints exponent = to_ints(n);
    Floats scaled = as_floats((Words)((Ints)p + (exponent << 23)));
    return chosen(is_below(x, splat(-87.3f)), splat(0.0f), scaled);
}

// exp for arguments of at most 0, to the precision of bfloat16: relative error below 2e-4.
INLINE Floats exponential_coarse(Floats x) {
#if LEVEL_AVX512
    const __m512 y = _mm512_mul_ps((__m512)x, _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(y, 8);
    const __m512 f = _mm512_sub_ps(y, n);
    // 2^f on [-1/2, 1/2]: near-minimax cubic.
    __m512 p = _mm512_set1_ps(0.05583828f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24263948f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69313673f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992456f));
    return (Floats)_mm512_scalef_ps(p, n);
#else
    return exponential(x);
#endif
}

INLINE Floats hyperbolic_tangent(Floats x) {
    Floats bounded = smaller(larger(x, splat(-15.0f)), splat(15.0f));
    Floats e = exponential(bounded * 2.0f);
    return 1.0f - 2.0f / (e + 1.0f);
}

// Products of 32 codes of 16 outputs with 32 int8 values; exact integers at every level.
// Byte 4 * output + i of `codes[j]` belongs to input 4 * j + i.
#if LEVEL_AVX512
INLINE Ints dot_codes(Ints acc, Bytes codes, const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(four));
}
INLINE Ints group_int4(const Bytes (&codes)[8], const int8_t *x) {
    Ints even = {}, odd = {};
    UNROLL for (int j = 0; j < 8; j += 2) {
        even = dot_codes(even, codes[j], x + 4 * j);
        odd = dot_codes(odd, codes[j + 1], x + 4 * j + 4);
    }
    return even + odd;
}
INLINE Ints group_int8(const Bytes (&codes)[8], const int8_t *x, int32_t sum_x) {
    return group_int4(codes, x) - (128 * sum_x);
}
#elif LEVEL_AVX2
INLINE __m256i four_of(const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
INLINE Ints group_int4(const Bytes (&codes)[8], const int8_t *x) {
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    // Eight sums of two products of at most 15 * 128 fit 16 bits.
    UNROLL for (int j = 0; j < 8; j++) UNROLL for (int half = 0; half < 2; half++) {
        __m256i products = _mm256_maddubs_epi16(half_of(codes[j], half), four_of(x + 4 * j));
        sums[half] = _mm256_add_epi16(sums[half], products);
    }
    __m256i ones = _mm256_set1_epi16(1);
    return joined<Ints>(_mm256_madd_epi16(sums[0], ones), _mm256_madd_epi16(sums[1], ones));
}
INLINE Ints group_int8(const Bytes (&codes)[8], const int8_t *x, int32_t) {
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256i ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8((char)0x80);
    UNROLL for (int j = 0; j < 8; j++) UNROLL for (int half = 0; half < 2; half++) {
        // Magnitudes times signed values: two products of at most 128 * 127 fit 16 bits.
        __m256i signed_codes = _mm256_xor_si256(half_of(codes[j], half), flip);
        __m256i values = _mm256_sign_epi8(four_of(x + 4 * j), signed_codes);
        __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(signed_codes), values);
        sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(products, ones));
    }
    return joined<Ints>(sums[0], sums[1]);
}
#else
INLINE Ints group_int4(const Bytes (&codes)[8], const int8_t *x) {
    int32_t sums[LANES] = {};
    for (int j = 0; j < 8; j++) {
        uint8_t bytes[64];
        std::memcpy(bytes, &codes[j], 64);
        for (int output = 0; output < LANES; output++)
            for (int i = 0; i < 4; i++) sums[output] += bytes[4 * output + i] * x[4 * j + i];
    }
    return load<Ints>(sums);
}
INLINE Ints group_int8(const Bytes (&codes)[8], const int8_t *x, int32_t sum_x) {
    return group_int4(codes, x) - (128 * sum_x);
}
#endif
