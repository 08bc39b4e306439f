// Turning the keys of a tile, each by an angle of its own.
//
// Knows: how a tile of keys lies, in fp32 and as pairs of bfloat16, and the layouts of rotations.
// Does not know: attention, or where the angles come from.
#pragma once
#include "rows.h"

static const int TILE = 64;

// One dimension of sixteen slots of a tile of keys, fp32 or pairs of bfloat16.
INLINE Floats key_lanes(const void *keys, bool f32, int dim, int v) {
    if (f32) return load<Floats>((const float *)keys + dim * TILE + v * LANES);
    const Words both = load<Words>((const uint32_t *)keys + dim / 2 * TILE + v * LANES);
    return as_floats(dim % 2 ? both & 0xffff0000u : both << 16);
}
INLINE void put_key_lanes(void *keys, bool f32, int dim, int v, Floats x) {
    if (f32) {
        store((float *)keys + dim * TILE + v * LANES, x);
        return;
    }
    uint32_t *at = (uint32_t *)keys + dim / 2 * TILE + v * LANES;
    const Words both = load<Words>(at), half = round_bf16(x);
    store(at, dim % 2 ? (both & 0xffffu) | half : (both & 0xffff0000u) | half >> 16);
}

INLINE void turn_pair(Floats &a, Floats &b, const float *cosines, const float *sines) {
    const Floats cosine = load<Floats>(cosines), sine = load<Floats>(sines), first = a;
    a = difference(product(a, cosine), product(b, sine));
    b = multiply_add(b, cosine, product(first, sine));
}

// Does what `turn_keys` does for halves of bfloat16 pairs, two dimensions of each half at once.
static void turn_key_pairs(const RopeTable &rope, const float *turns, uint32_t *keys) {
    const float *sines = turns + rope.pairs * TILE;
    uint32_t *first = keys + rope.first_dim / 2 * TILE, *second = first + rope.pairs / 2 * TILE;
    for (int i = 0; i < rope.pairs; i += 2)
        UNROLL for (int v = 0; v < 4; v++) {
            const int low = i * TILE + v * LANES, high = low + TILE, at = i / 2 * TILE + v * LANES;
            const Words a = load<Words>(first + at), b = load<Words>(second + at);
            Floats a_low = as_floats(a << 16), a_high = as_floats(a & 0xffff0000u);
            Floats b_low = as_floats(b << 16), b_high = as_floats(b & 0xffff0000u);
            turn_pair(a_low, b_low, turns + low, sines + low);
            turn_pair(a_high, b_high, turns + high, sines + high);
            store(first + at, round_bf16(a_high) | round_bf16(a_low) >> 16);
            store(second + at, round_bf16(b_high) | round_bf16(b_low) >> 16);
        }
}

// Turns the keys of a tile to where they stand now, each by its slot's angle. It costs about as much
// as reading the tile, where a query turned for every few slots would cost a reading each.
static void turn_keys(const RopeTable &rope, const float *turns, bool f32, void *keys) {
    if (!f32 && !rope.interleaved && rope.pairs % 2 == 0 && rope.first_dim % 2 == 0) {
        turn_key_pairs(rope, turns, (uint32_t *)keys);
        return;
    }
    const float *sines = turns + rope.pairs * TILE;
    const int step = rope.interleaved ? 2 : 1, apart = rope.interleaved ? 1 : rope.pairs;
    for (int i = 0; i < rope.pairs; i++) {
        const int first = rope.first_dim + i * step, second = first + apart;
        for (int v = 0; v < 4; v++) {
            Floats a = key_lanes(keys, f32, first, v), b = key_lanes(keys, f32, second, v);
            turn_pair(a, b, turns + i * TILE + v * LANES, sines + i * TILE + v * LANES);
            put_key_lanes(keys, f32, first, v, a);
            put_key_lanes(keys, f32, second, v, b);
        }
    }
}
