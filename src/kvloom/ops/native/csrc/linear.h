// Products of rows with packed matrices.
//
// Knows: layouts of weights and rows, and how a team shares the outputs.
// Does not know: what the products are for.
#pragma once
#include "rows.h"

struct Team {
    int id;
    int count;
};

// The part of `total` units of work that a member takes: neighbours, so that memory is streamed.
INLINE void share_of(const Team &team, int64_t total, int64_t &first, int64_t &stop) {
    first = total * team.id / team.count;
    stop = total * (team.id + 1) / team.count;
}

static const int PANEL = 64;       // outputs of a block of plain weights
// Rows of a kernel: as many accumulators as the level has registers for.
#if LEVEL_AVX512
static const int CODED_ROWS = 8, PLAIN_ROWS = 6;
#elif LEVEL_AVX2
static const int CODED_ROWS = 4, PLAIN_ROWS = 4;
#else
static const int CODED_ROWS = 2, PLAIN_ROWS = 2;
#endif
static const int ROW_BLOCK = 128;  // rows that stay in cache while a team member's weights pass

// acc[r][v] += a[r] . b[v] over `steps` inputs (fp32) or pairs of inputs (bfloat16).
#if LEVEL_AVX2
// Sixteen lanes are two registers here, of sixteen: one vector of outputs at a time keeps the
// accumulators of all rows in registers.
template <int ROWS, int VECTORS>
INLINE void multiply_floats(Floats (&acc)[ROWS][VECTORS], const float *a, int64_t stride,
                            const float *b, int64_t width, int steps) {
    for (int v = 0; v < VECTORS; v++) {
        __m256 low[ROWS], high[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) low[r] = half_of(acc[r][v], 0), high[r] = half_of(acc[r][v], 1);
        for (int s = 0; s < steps; s++) {
            const float *column = b + s * width + v * LANES;
            const __m256 first = _mm256_loadu_ps(column), second = _mm256_loadu_ps(column + 8);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m256 x = _mm256_broadcast_ss(a + r * stride + s);
                low[r] = _mm256_fmadd_ps(x, first, low[r]);
                high[r] = _mm256_fmadd_ps(x, second, high[r]);
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) acc[r][v] = joined<Floats>(low[r], high[r]);
    }
}
template <int ROWS, int VECTORS>
INLINE void multiply_pairs(Floats (&acc)[ROWS][VECTORS], const uint32_t *a, int64_t stride,
                           const uint32_t *b, int64_t width, int steps) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000u);
    for (int v = 0; v < VECTORS; v++) {
        __m256 low[ROWS], high[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) low[r] = half_of(acc[r][v], 0), high[r] = half_of(acc[r][v], 1);
        for (int s = 0; s < steps; s++) {
            const __m256i *column = (const __m256i *)(b + s * width + v * LANES);
            const __m256i first = _mm256_loadu_si256(column), second = _mm256_loadu_si256(column + 1);
            const __m256 first_low = _mm256_castsi256_ps(_mm256_slli_epi32(first, 16));
            const __m256 first_high = _mm256_castsi256_ps(_mm256_and_si256(first, upper));
            const __m256 second_low = _mm256_castsi256_ps(_mm256_slli_epi32(second, 16));
            const __m256 second_high = _mm256_castsi256_ps(_mm256_and_si256(second, upper));
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m256i pair = _mm256_set1_epi32((int)a[r * stride + s]);
                const __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
                const __m256 y = _mm256_castsi256_ps(_mm256_and_si256(pair, upper));
                low[r] = _mm256_fmadd_ps(y, first_high, _mm256_fmadd_ps(x, first_low, low[r]));
                high[r] = _mm256_fmadd_ps(y, second_high, _mm256_fmadd_ps(x, second_low, high[r]));
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) acc[r][v] = joined<Floats>(low[r], high[r]);
    }
}
#else
template <int ROWS, int VECTORS>
INLINE void multiply_floats(Floats (&acc)[ROWS][VECTORS], const float *a, int64_t stride,
                            const float *b, int64_t width, int steps) {
    for (int s = 0; s < steps; s++) {
        Floats column[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) column[v] = load<Floats>(b + s * width + v * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            Floats x = splat(a[r * stride + s]);
            UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = multiply_add(x, column[v], acc[r][v]);
        }
    }
}
template <int ROWS, int VECTORS>
INLINE void multiply_pairs(Floats (&acc)[ROWS][VECTORS], const uint32_t *a, int64_t stride,
                           const uint32_t *b, int64_t width, int steps) {
    for (int s = 0; s < steps; s++) {
        Words column[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) column[v] = load<Words>(b + s * width + v * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const uint32_t x = a[r * stride + s];
            UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = pair_product(acc[r][v], x, column[v]);
        }
    }
}
#endif

struct Target {
    float *out;      // first output of row 0
    int64_t stride;  // from row to row
    bool add;
    float scale;
};

INLINE void put_outputs(const Target &target, int64_t row, int64_t output, int count, Floats v,
                        const float *bias) {
    float *out = target.out + row * target.stride + output;
    if (count == LANES) {
        if (bias) v += load<Floats>(bias + output);
        v *= target.scale;
        if (target.add) v += load<Floats>(out);
        store(out, v);
        return;
    }
    for (int i = 0; i < count; i++) {
        float x = (bias ? v[i] + bias[output + i] : v[i]) * target.scale;
        out[i] = target.add ? out[i] + x : x;
    }
}

// ROWS rows times one block of 16 outputs. Every kernel height sums the groups in the same order.
template <int ROWS, bool INT4>
static void coded_block(const Operand &x, int64_t row, const Weight &weight, int64_t block,
                        const Target &target) {
    const int groups = weight.inputs / GROUP;
    const uint8_t *codes = (const uint8_t *)weight.codes + block * groups * (INT4 ? 320 : 512);
    const uint16_t *scales = INT4 ? nullptr : (const uint16_t *)weight.scales + block * groups * LANES;
    Floats acc[ROWS] = {};
    for (int g = 0; g < groups; g++) {
        Bytes group[8];
        Floats scale, minimum = {};
        if (INT4) {
            UNROLL for (int j = 0; j < 4; j++) {
                split_nibbles(load<Bytes>(codes + 64 * j), group[2 * j], group[2 * j + 1]);
            }
            scale = from_fp16((const uint16_t *)(codes + 256));
            minimum = from_fp16((const uint16_t *)(codes + 288));
            codes += 320;
        } else {
            UNROLL for (int j = 0; j < 8; j++) group[j] = load<Bytes>(codes + 64 * j);
            scale = from_fp16(scales);
            codes += 512;
            scales += LANES;
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            const int64_t place = (row + r) * groups + g;
            const int8_t *values = x.codes + (row + r) * x.inputs + g * GROUP;
            Ints products = INT4 ? group_int4(group, values) : group_int8(group, values, x.counts[place]);
            acc[r] = multiply_add(to_floats(products), product(scale, splat(x.scales[place])), acc[r]);
            if (INT4) acc[r] = multiply_add(minimum, splat(x.sums[place]), acc[r]);
        }
    }
    const int64_t output = block * LANES;
    const int64_t left = weight.outputs - output;
    const int count = left < LANES ? (int)left : LANES;
    UNROLL for (int r = 0; r < ROWS; r++)
        put_outputs(target, row + r, output, count, acc[r], weight.bias);
}

template <int ROWS>
static void plain_panel(const Operand &x, int64_t row, const Weight &weight, int64_t panel,
                        const Target &target) {
    Floats acc[ROWS][4] = {};
    if (weight.format == FORMAT_F32) {
        const float *b = (const float *)weight.codes + panel * weight.inputs * PANEL;
        multiply_floats<ROWS, 4>(acc, x.floats + row * x.inputs, x.inputs, b, PANEL, weight.inputs);
    } else {
        const int64_t pairs = (weight.inputs + 1) / 2;
        const uint32_t *b = (const uint32_t *)weight.codes + panel * pairs * PANEL;
        multiply_pairs<ROWS, 4>(acc, x.pairs + row * pairs, pairs, b, PANEL, (int)pairs);
    }
    for (int v = 0; v < 4; v++) {
        const int64_t output = panel * PANEL + v * LANES;
        const int64_t left = weight.outputs - output;
        if (left <= 0) break;
        UNROLL for (int r = 0; r < ROWS; r++)
            put_outputs(target, row + r, output, left < LANES ? (int)left : LANES, acc[r][v], weight.bias);
    }
}

// The kernel of the right height; `rows` is at most ROWS.
template <int ROWS, bool INT4>
INLINE void coded_rows(const Operand &x, int64_t row, int rows, const Weight &weight, int64_t block,
                       const Target &target) {
    if (rows == ROWS) coded_block<ROWS, INT4>(x, row, weight, block, target);
    else if constexpr (ROWS > 1) coded_rows<ROWS - 1, INT4>(x, row, rows, weight, block, target);
}
template <int ROWS>
INLINE void plain_rows(const Operand &x, int64_t row, int rows, const Weight &weight, int64_t panel,
                       const Target &target) {
    if (rows == ROWS) plain_panel<ROWS>(x, row, weight, panel, target);
    else if constexpr (ROWS > 1) plain_rows<ROWS - 1>(x, row, rows, weight, panel, target);
}

INLINE void run_block(const Operand &x, int64_t row, int rows, const Weight &weight, int64_t unit,
                      const Target &target) {
    if (weight.format == FORMAT_INT4) coded_rows<CODED_ROWS, true>(x, row, rows, weight, unit, target);
    else if (weight.format == FORMAT_INT8) coded_rows<CODED_ROWS, false>(x, row, rows, weight, unit, target);
    else plain_rows<PLAIN_ROWS>(x, row, rows, weight, unit, target);
}

INLINE int64_t units_of(const Weight &weight) {
    const int width = is_coded(weight.format) ? LANES : PANEL;
    return (weight.outputs + width - 1) / width;
}

// out[:, i-th weight's columns] (+)= scale * (x . weight^T + bias), for weights that read one operand.
static void linear(const Team &team, const Operand &x, int64_t num_rows, const Weight *weights,
                   int num_weights, const Target &target) {
    int64_t total = 0, first, stop;
    for (int i = 0; i < num_weights; i++) total += units_of(weights[i]);
    share_of(team, total, first, stop);
    for (int64_t block = 0; block < num_rows; block += ROW_BLOCK) {
        const int64_t end = block + ROW_BLOCK < num_rows ? block + ROW_BLOCK : num_rows;
        int64_t before = 0, column = 0;
        for (int i = 0; i < num_weights; i++) {
            const Weight &weight = weights[i];
            const int64_t units = units_of(weight);
            const int64_t low = first > before ? first - before : 0;
            const int64_t high = stop - before < units ? stop - before : units;
            const int tall = is_coded(weight.format) ? CODED_ROWS : PLAIN_ROWS;
            Target columns = target;
            columns.out += column;
            for (int64_t unit = low; unit < high; unit++)
                for (int64_t row = block; row < end; row += tall)
                    run_block(x, row, end - row < tall ? (int)(end - row) : tall, weight, unit, columns);
            before += units;
            column += weight.outputs;
        }
    }
}
