// Work on single rows: norms, activations for the products, embedding, rotation, gates.
//
// Knows: rows of floats and the number formats of products.
// Does not know: layers or documents.
#pragma once
#include "abi.h"
#include "simd.h"

static const int GROUP = 32;  // inputs that share a scale
static const int MAX_DIM = 256;  // of a head

// Rows as the products read them; one of the three forms is filled, as the weights ask.
struct Operand {
    int32_t format;  // of the weights: int8 and int4 share one form
    int32_t inputs;
    float *floats;
    uint32_t *pairs;  // bfloat16, two inputs each
    int8_t *codes;
    float *scales;    // per group
    float *sums;      // scale times sum of codes, per group
    int32_t *counts;  // sum of codes, per group
};

INLINE bool is_coded(int32_t format) { return format == FORMAT_INT8 || format == FORMAT_INT4; }

// Sets the values `first` to `stop` of a row, which are whole groups, or end at the row's end.
static void set_operand(const Operand &operand, int64_t row, const float *x, int first, int stop) {
    const int n = operand.inputs;
    if (operand.format == FORMAT_F32) {
        std::memcpy(operand.floats + row * n + first, x + first, sizeof(float) * (stop - first));
        return;
    }
    if (operand.format == FORMAT_BF16) {
        uint32_t *pairs = operand.pairs + row * ((n + 1) / 2);
        int i = first;
        for (; i + LANES <= stop; i += LANES) store_bf16(pairs + i / 2, load<Floats>(x + i));
        for (; i + 2 <= stop; i += 2) pairs[i / 2] = bf16_pair(x[i], x[i + 1]);
        if (stop % 2) pairs[stop / 2] = bf16_pair(x[stop - 1], 0.0f);
        return;
    }
    const int groups = n / GROUP;
    int8_t *codes = operand.codes + row * n;
    for (int g = first / GROUP; g < stop / GROUP; g++) {
        Floats low = load<Floats>(x + g * GROUP), high = load<Floats>(x + g * GROUP + LANES);
        float most = largest_magnitude(low, high);
        if (most < 1e-36f) most = 0.0f;  // 127 divided by less is no fp32 number
        if (!(most < INFINITY)) low = high = Floats{};  // the scale alone makes the product NaN
        float scale = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
        const float magic = 12582912.0f;  // rounds to the nearest integer, ties to even
        Ints a = to_ints(difference(multiply_add(low, splat(inverse), splat(magic)), splat(magic)));
        Ints b = to_ints(difference(multiply_add(high, splat(inverse), splat(magic)), splat(magic)));
        store(codes + g * GROUP, to_smalls(a));
        store(codes + g * GROUP + LANES, to_smalls(b));
        const int32_t count = sum_of_ints(a + b);
        operand.scales[row * groups + g] = scale;
        operand.sums[row * groups + g] = scale * (float)count;
        operand.counts[row * groups + g] = count;
    }
}

struct Spread {  // of a row: what a norm subtracts, and multiplies by
    float mean;
    float factor;
};

static Spread spread_of(const Norm &norm, const float *x) {
    const int n = norm.width;
    float mean = 0.0f;
    if (norm.kind == NORM_LAYER) {
        float total = 0.0f;
        for (int i = 0; i < n; i++) total += x[i];
        mean = total / n;
    }
    Floats squares[4] = {};
    int i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        UNROLL for (int v = 0; v < 4; v++) {
            Floats y = difference(load<Floats>(x + i + v * LANES), splat(mean));
            squares[v] = multiply_add(y, y, squares[v]);
        }
    float square = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    return Spread{mean, 1.0f / std::sqrt(square / n + norm.epsilon)};
}

// Norms the values `first` to `stop` of x into y, which may be x.
static void norm_part(const Norm &norm, const Spread &spread, const float *x, float *y, int first, int stop) {
    int i = first;
    for (; i + LANES <= stop; i += LANES) {
        Floats v = product(difference(load<Floats>(x + i), splat(spread.mean)), splat(spread.factor));
        if (norm.weight) v = product(v, load<Floats>(norm.weight + i));
        if (norm.bias) v += load<Floats>(norm.bias + i);
        store(y + i, v);
    }
    for (; i < stop; i++) {
        float v = (x[i] - spread.mean) * spread.factor;
        if (norm.weight) v *= norm.weight[i];
        if (norm.bias) v += norm.bias[i];
        y[i] = v;
    }
}

static void norm_row(const Norm &norm, const float *x, float *y) {
    norm_part(norm, spread_of(norm, x), x, y, 0, norm.width);
}

INLINE Floats activate(Floats x, int32_t kind) {
    if (kind == ACTIVATION_SILU) return x / (1.0f + exponential(-x));
    const float root = 0.7978845608028654f;
    return 0.5f * x * (1.0f + hyperbolic_tangent(root * (x + 0.044715f * x * x * x)));
}

// activation(gate) * up, or activation(up) where there is no gate, for values `first` to `stop`.
static void gate_part(int32_t kind, const float *gate, const float *up, float *out, int first, int stop) {
    const float *inner = gate ? gate : up;
    int i = first;
    if (kind != ACTIVATION_GELU)
        for (; i + LANES <= stop; i += LANES) {
            Floats y = activate(load<Floats>(inner + i), kind);
            store(out + i, gate ? y * load<Floats>(up + i) : y);
        }
    for (; i < stop; i++) {
        const float x = inner[i];
        const float y = kind == ACTIVATION_GELU ? 0.5f * x * (1.0f + std::erf(x * 0.7071067811865476f))
                                                : activate(splat(x), kind)[0];
        out[i] = gate ? y * up[i] : y;
    }
}

static void rotate_head(const RopeTable &rope, int64_t row, float *x) {
    const float *cosines = rope.cos + row * rope.pairs, *sines = rope.sin + row * rope.pairs;
    float *first = x + rope.first_dim;
    const int step = rope.interleaved ? 2 : 1, apart = rope.interleaved ? 1 : rope.pairs;
    int i = 0;
    if (!rope.interleaved)
        for (; i + LANES <= rope.pairs; i += LANES) {
            const Floats a = load<Floats>(first + i), b = load<Floats>(first + i + apart);
            const Floats cosine = load<Floats>(cosines + i), sine = load<Floats>(sines + i);
            store(first + i, a * cosine - b * sine);
            store(first + i + apart, b * cosine + a * sine);
        }
    for (; i < rope.pairs; i++) {
        const float a = first[i * step], b = first[i * step + apart];
        first[i * step] = a * cosines[i] - b * sines[i];
        first[i * step + apart] = b * cosines[i] + a * sines[i];
    }
}

// Rounds a row to int8, the largest magnitude to 127, ties to even, and returns its scale; the same
// bits at every level. What is no finite number becomes the scale. `codes` has room for whole vectors.
static float code_row(const float *x, int dims, int8_t *codes) {
    const float magic = 12582912.0f;  // rounds to the nearest integer
    Floats rest = {};
    const int whole = dims / LANES * LANES;
    std::memcpy(&rest, x + whole, sizeof(float) * (dims - whole));
    Ints magnitudes = (Ints)as_words(rest) & 0x7fffffff;
    for (int i = 0; i < whole; i += LANES)
        magnitudes = larger_int(magnitudes, (Ints)as_words(load<Floats>(x + i)) & 0x7fffffff);
    const float most = largest_magnitude(as_floats((Words)magnitudes), Floats{});
    const float scale = most < 1e-35f ? 0.0f : most / 127.0f;  // of less it would not be normal
    if (!(scale > 0.0f && scale < INFINITY)) {
        std::memset(codes, 0, dims);
        return scale;
    }
    // A quotient is rounded once everywhere; a product might be fused with the sum.
    for (int i = 0; i < dims; i += LANES) {
        const Floats v = quotient(i < whole ? load<Floats>(x + i) : rest, splat(scale));
        store(codes + i, to_smalls(to_ints(difference(difference(v, splat(-magic)), splat(magic)))));
    }
    return scale;
}

// An arena of keys or values; see `tiles.py` for the order of a tile of 64 slots.
struct Arena {
    void *tiles;
    float *scales;  // int8 only
    int32_t format;
    int dims;
    int64_t slots;
};

static void put_key(const Arena &arena, int head, int64_t slot, const float *x) {
    const int dims = arena.dims, lane = (int)(slot & 63);
    const int64_t tile = ((int64_t)head * arena.slots + (slot & ~63LL)) * dims;
    if (arena.format == FORMAT_F32) {
        float *keys = (float *)arena.tiles + tile;
        for (int i = 0; i < dims; i++) keys[i * 64 + lane] = x[i];
    } else if (arena.format == FORMAT_BF16) {
        uint32_t *keys = (uint32_t *)((uint16_t *)arena.tiles + tile);
        for (int i = 0; i < dims / 2; i++) keys[i * 64 + lane] = bf16_pair(x[2 * i], x[2 * i + 1]);
    } else {
        int8_t codes[MAX_DIM], *keys = (int8_t *)arena.tiles + tile + 2 * lane;
        arena.scales[head * arena.slots + slot] = code_row(x, dims, codes);
        for (int i = 0; i < dims / 2; i++) std::memcpy(keys + i * 128, codes + 2 * i, 2);
    }
}

static void put_value(const Arena &arena, int head, int64_t slot, const float *x) {
    const int dims = arena.dims, lane = (int)(slot & 63);
    const int64_t tile = ((int64_t)head * arena.slots + (slot & ~63LL)) * dims;
    const int64_t pair = tile + (int64_t)(lane / 2) * dims * 2 + lane % 2;
    if (arena.format == FORMAT_F32) {
        std::memcpy((float *)arena.tiles + tile + (int64_t)lane * dims, x, sizeof(float) * dims);
    } else if (arena.format == FORMAT_BF16) {
        uint16_t *values = (uint16_t *)arena.tiles + pair;
        for (int i = 0; i < dims; i++) values[2 * i] = to_bf16(x[i]);
    } else {
        int8_t codes[MAX_DIM], *values = (int8_t *)arena.tiles + pair;
        arena.scales[head * arena.slots + slot] = code_row(x, dims, codes);
        for (int i = 0; i < dims; i++) values[2 * i] = codes[i];
    }
}

// Decodes one row of a packed matrix.
static void embed_row(const Weight &weight, int64_t token, float scale, float *x) {
    const int n = weight.inputs, groups = n / GROUP;
    const int64_t block = token / LANES;
    const int lane = (int)(token % LANES);
    const uint8_t *bytes = (const uint8_t *)weight.codes;
    for (int i = 0; i < n; i++) {
        float v;
        if (weight.format == FORMAT_F32) {
            v = ((const float *)bytes)[((token / 64) * n + i) * 64 + token % 64];
        } else if (weight.format == FORMAT_BF16) {
            const int64_t pairs = (n + 1) / 2, place = ((token / 64) * pairs + i / 2) * 64;
            v = from_bf16(((const uint16_t *)bytes)[(place + token % 64) * 2 + i % 2]);
        } else {
            const int64_t group = block * groups + i / GROUP;
            const int inner = i % GROUP;
            float buffer[LANES];
            if (weight.format == FORMAT_INT8) {
                const uint8_t code = bytes[group * 512 + (inner / 4) * 64 + lane * 4 + inner % 4];
                store(buffer, from_fp16((const uint16_t *)weight.scales + group * LANES));
                v = buffer[lane] * (float)((int)code - 128);
            } else {
                const uint8_t *place = bytes + group * 320;
                const uint8_t pair = place[(inner / 8) * 64 + lane * 4 + inner % 4];
                const int code = inner % 8 < 4 ? pair & 15 : pair >> 4;
                store(buffer, from_fp16((const uint16_t *)(place + 256)));
                v = buffer[lane] * (float)code;
                store(buffer, from_fp16((const uint16_t *)(place + 288)));
                v += buffer[lane];
            }
        }
        x[i] = v * scale;
    }
}

// Index of the largest value, the first of equals; the first NaN comes before all, as in NumPy.
static int64_t index_of_largest(const float *x, int64_t count) {
    const int BLOCK = 16 * LANES;
    const Floats zero = {};
    Floats most = splat(-INFINITY), poison = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats v = load<Floats>(x + i);
        most = larger(most, v);
        poison = multiply_add(v, zero, poison);  // NaN where v is no finite number
    }
    float peak = largest(most), odd = sum(poison);
    for (; i < count; i++) {
        peak = x[i] > peak ? x[i] : peak;
        odd += x[i] * 0.0f;
    }
    if (odd == 0.0f) {
        for (i = 0; i + BLOCK <= count; i += BLOCK) {
            Floats high = load<Floats>(x + i);
            for (int part = 1; part < 16; part++) high = larger(high, load<Floats>(x + i + part * LANES));
            if (largest(high) == peak) break;
        }
        while (x[i] != peak) i++;
        return i;
    }
    int64_t found = 0;
    for (i = 0; i < count; i++) {
        if (std::isnan(x[i])) return i;
        if (x[i] > x[found]) found = i;
    }
    return found;
}
