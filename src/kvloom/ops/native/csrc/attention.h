// Attention of rows over pieces of an arena: one pass with a running maximum, merged at the end.
//
// Knows: tiles of 64 slots, positions, shifts, windows, and partial results.
// Does not know: documents, or who shares what; `reads.py` decides that.
//
// Source: Dao et al. 2022 (FlashAttention), algorithm 1, over a list of pieces; the merge of
// partials is Milakov & Gimelshein 2018.
#pragma once
#include <atomic>

#include "linear.h"
#include "turns.h"

static const int MAX_QUERIES = 96;  // query vectors of an item: rows times heads of one KV head

INLINE Arena keys_of(const Layer &layer, int32_t format, int64_t slots) {
    return Arena{layer.keys, layer.key_scales, format, layer.k_dim, slots};
}
INLINE Arena values_of(const Layer &layer, int32_t format, int64_t slots) {
    return Arena{layer.values, layer.value_scales, format, layer.v_dim, slots};
}

struct Heads {
    const Layer *layer;
    int32_t kv_format;
    int64_t slots;
    const RopeTable *rope;  // its layout; the angles come with the piece
    const int64_t *pos;
    const float *q;  // rotated, (rows, stride)
    int64_t stride;
    float *out;       // (rows, heads * v_dim)
    float *partials;  // (partial rows, heads, v_dim + 2): o, maximum, sum
};

// What an item holds while it passes over its pieces.
struct Running {
    alignas(64) float q[MAX_QUERIES * MAX_DIM];  // scaled; bfloat16 pairs use half of it
    alignas(64) float o[MAX_QUERIES * MAX_DIM];
    float most[MAX_QUERIES];
    float total[MAX_QUERIES];
    int64_t pos[MAX_QUERIES];
    alignas(64) float keys[TILE * MAX_DIM];  // of the tile at hand: codes as bfloat16, or turned keys
    alignas(64) uint16_t values[TILE * MAX_DIM];
};

// A tile of one head as the products read it.
struct Tile {
    const void *keys;
    const void *values;
    const float *key_scales;  // int8 only: the codes stand here as bfloat16
    const float *value_scales;
};

// Scales a query and puts it where the products read it, in the format of the keys.
static void scale_query(const float *x, int dims, float scale, int32_t format, float *queries, int query) {
    float *floats = queries + query * dims;
    uint32_t *pairs = (uint32_t *)queries + query * (dims / 2);
    int i = 0;
    for (; i + LANES <= dims; i += LANES) {
        const Floats v = product(load<Floats>(x + i), splat(scale));
        if (format == FORMAT_F32) store(floats + i, v);
        else store_bf16(pairs + i / 2, v);
    }
    for (; i < dims; i += 2) {
        const float low = x[i] * scale, high = x[i + 1] * scale;
        if (format == FORMAT_F32) {
            floats[i] = low;
            floats[i + 1] = high;
        } else {
            pairs[i / 2] = bf16_pair(low, high);
        }
    }
}

static void load_queries(const Heads &at, const Reads &reads, const Item &item, int head,
                         const float *turn, Running &run) {
    const Layer &layer = *at.layer;
    const int repeat = layer.heads / layer.kv_heads, dims = layer.k_dim;
    for (int r = 0; r < item.num_rows; r++) {
        const int64_t row = reads.row_index[item.first_row + r];
        for (int j = 0; j < repeat; j++) {
            const int query = r * repeat + j;
            float x[MAX_DIM];
            std::memcpy(x, at.q + row * at.stride + (head * repeat + j) * dims, sizeof(float) * dims);
            if (turn && at.rope) {
                RopeTable table = *at.rope;
                table.cos = turn;
                table.sin = turn + table.pairs;
                rotate_head(table, 0, x);
            }
            scale_query(x, dims, layer.scale, at.kv_format, run.q, query);
            run.pos[query] = at.pos[row];
        }
    }
}

// Which lanes of a tile hold slots of the piece, where they stand, and what is added to them.
struct TileSlots {
    Ints pos[4];     // of the keys, relative to `origin`
    Floats bias[4];  // NEVER outside of the piece
    int64_t origin;
    bool whole;      // no lane is outside of the piece or has a bias
    int64_t low, high;
};

static void describe_tile(const Piece &piece, int64_t tile, TileSlots &slots) {
    const int64_t start = tile * TILE;
    const int64_t low = piece.first_slot > start ? piece.first_slot - start : 0;
    const int64_t high = piece.stop_slot - start < TILE ? piece.stop_slot - start : TILE;
    slots.whole = low == 0 && high == TILE && !piece.bias;
    slots.origin = piece.pos ? 0 : piece.first_pos + start - piece.first_slot;
    slots.low = piece.pos ? INT64_MIN : slots.origin + low;
    slots.high = piece.pos ? INT64_MAX : slots.origin + high - 1;
    for (int v = 0; v < 4; v++) {
        Ints lane = lane_numbers() + v * LANES;
        Ints inside = is_above(lane, splat_int((int)low - 1)) & is_above(splat_int((int)high), lane);
        // What others left outside of the piece may be anything; no row sees that position.
        slots.pos[v] = (lane & inside) | (splat_int(INT32_MAX) & ~inside);
        slots.bias[v] = chosen(inside, splat(0.0f), splat(NEVER));
        if (!piece.bias && !piece.pos) continue;
        const int64_t first = start + v * LANES - piece.first_slot;
        if (first >= 0 && first + LANES <= piece.stop_slot - piece.first_slot) {
            if (piece.bias) slots.bias[v] = larger(load<Floats>(piece.bias + first), splat(NEVER));
            if (piece.pos) slots.pos[v] = load<Ints>(piece.pos + first) + (int32_t)piece.shift;
            continue;
        }
        for (int i = 0; i < LANES; i++) {
            const int64_t slot = first + i;
            if (slot < 0 || slot >= piece.stop_slot - piece.first_slot) continue;
            if (piece.bias) slots.bias[v][i] = larger(splat(piece.bias[slot]), splat(NEVER))[0];
            if (piece.pos) slots.pos[v][i] = (int32_t)(piece.pos[slot] + piece.shift);
        }
    }
}

// One tile for ROWS query vectors.
template <int ROWS, int32_t FORMAT>
static void attend_tile(const Layer &layer, const Tile &tile, const TileSlots &slots, int first, Running &run) {
    constexpr bool F32 = FORMAT == FORMAT_F32, CODED = FORMAT == FORMAT_INT8;
    Floats s[ROWS][4] = {};
    if (F32)
        multiply_floats<ROWS, 4>(s, run.q + first * layer.k_dim, layer.k_dim, (const float *)tile.keys, TILE,
                                 layer.k_dim);
    else
        multiply_pairs<ROWS, 4>(s, (const uint32_t *)run.q + first * (layer.k_dim / 2),
                                layer.k_dim / 2, (const uint32_t *)tile.keys, TILE, layer.k_dim / 2);
    if (CODED)
        for (int v = 0; v < 4; v++) {
            const Floats scales = load<Floats>(tile.key_scales + v * LANES);
            for (int r = 0; r < ROWS; r++) s[r][v] = product(s[r][v], scales);
        }
    alignas(64) float weights[ROWS * TILE];
    uint32_t *pairs = (uint32_t *)weights;
    for (int r = 0; r < ROWS; r++) {
        const int query = first + r;
        const int64_t pos = run.pos[query], oldest = layer.window ? pos - layer.window + 1 : INT64_MIN;
        const bool plain = slots.whole && slots.high <= pos && slots.low >= oldest;
        Floats visible[4];
        if (layer.softcap > 0.0f)
            for (int v = 0; v < 4; v++) s[r][v] = hyperbolic_tangent(s[r][v] / layer.softcap) * layer.softcap;
        if (!plain) {
            // Compared relative to the tile, where 32 bits are enough at any position.
            const int64_t newest = pos - slots.origin, eldest = oldest == INT64_MIN ? INT32_MIN : oldest - slots.origin;
            const int32_t up = (int32_t)(newest >= INT32_MAX ? INT32_MAX - 1 : newest < INT32_MIN ? INT32_MIN : newest);
            const int32_t down = (int32_t)(eldest < INT32_MIN ? INT32_MIN : eldest > INT32_MAX ? INT32_MAX : eldest);
            for (int v = 0; v < 4; v++) {
                Ints hidden = is_above(slots.pos[v], splat_int(up)) | is_above(splat_int(down), slots.pos[v]);
                s[r][v] = chosen(hidden, splat(NEVER), s[r][v] + slots.bias[v]);
                visible[v] = chosen(is_below(splat(0.5f * NEVER), s[r][v]), splat(1.0f), splat(0.0f));
            }
        }
        const float old = run.most[query];
        float most = largest(larger(larger(s[r][0], s[r][1]), larger(s[r][2], s[r][3])));
        most = most > old ? most : old;
        Floats sums = {};
        for (int v = 0; v < 4; v++) {
            Floats p = F32 ? exponential(difference(s[r][v], splat(most))) : exponential_coarse(difference(s[r][v], splat(most)));
            if (!plain) p *= visible[v];
            if (FORMAT == FORMAT_BF16) p = as_floats(round_bf16(p));
            sums += p;
            if (CODED) {  // weights of what is hidden stay zeros, whatever its scale may be
                p = product(p, load<Floats>(tile.value_scales + v * LANES));
                if (!plain) p = chosen(is_below(splat(0.0f), visible[v]), p, splat(0.0f));
                p = as_floats(round_bf16(p));
            }
            if (F32) {
                store(weights + r * TILE + v * LANES, p);
            } else {
                store((uint16_t *)(pairs + r * (TILE / 2)) + v * LANES, upper_halves(as_words(p)));
            }
        }
        if (most != old) {
            const float factor = std::exp(old - most);
            run.total[query] *= factor;
            float *o = run.o + query * layer.v_dim;
            for (int i = 0; i < layer.v_dim; i += LANES) store(o + i, product(load<Floats>(o + i), splat(factor)));
            run.most[query] = most;
        }
        run.total[query] += sum(sums);
    }
    for (int d = 0; d < layer.v_dim; d += 2 * LANES) {
        if (layer.v_dim - d >= 4 * LANES) {
            Floats o[ROWS][4];
            for (int r = 0; r < ROWS; r++)
                UNROLL for (int v = 0; v < 4; v++) o[r][v] = load<Floats>(run.o + (first + r) * layer.v_dim + d + v * LANES);
            if (F32)
                multiply_floats<ROWS, 4>(o, weights, TILE, (const float *)tile.values + d, layer.v_dim, TILE);
            else
                multiply_pairs<ROWS, 4>(o, pairs, TILE / 2, (const uint32_t *)tile.values + d, layer.v_dim, TILE / 2);
            for (int r = 0; r < ROWS; r++)
                UNROLL for (int v = 0; v < 4; v++) store(run.o + (first + r) * layer.v_dim + d + v * LANES, o[r][v]);
            d += 2 * LANES;
            continue;
        }
        for (int e = d; e < layer.v_dim && e < d + 2 * LANES; e += LANES) {
            Floats o[ROWS][1];
            for (int r = 0; r < ROWS; r++) o[r][0] = load<Floats>(run.o + (first + r) * layer.v_dim + e);
            if (F32)
                multiply_floats<ROWS, 1>(o, weights, TILE, (const float *)tile.values + e, layer.v_dim, TILE);
            else
                multiply_pairs<ROWS, 1>(o, pairs, TILE / 2, (const uint32_t *)tile.values + e, layer.v_dim, TILE / 2);
            for (int r = 0; r < ROWS; r++) store(run.o + (first + r) * layer.v_dim + e, o[r][0]);
        }
    }
}

template <int ROWS, int32_t FORMAT>
INLINE void attend_rows(const Layer &layer, const Tile &tile, const TileSlots &slots, int first, int count,
                        Running &run) {
    if (count == ROWS) attend_tile<ROWS, FORMAT>(layer, tile, slots, first, run);
    else if constexpr (ROWS > 1) attend_rows<ROWS - 1, FORMAT>(layer, tile, slots, first, count, run);
}

// Finds a tile of a head; codes are turned into bfloat16 once, for all queries.
static Tile tile_of(const Heads &at, int head, int64_t number, Running &run) {
    const Layer &layer = *at.layer;
    const int64_t slot = (int64_t)head * at.slots + number * TILE;
    const int64_t key = slot * layer.k_dim, value = slot * layer.v_dim;
    if (at.kv_format == FORMAT_F32)
        return Tile{(const float *)layer.keys + key, (const float *)layer.values + value, nullptr, nullptr};
    if (at.kv_format == FORMAT_BF16)
        return Tile{(const uint16_t *)layer.keys + key, (const uint16_t *)layer.values + value, nullptr, nullptr};
    codes_to_bf16((const int8_t *)layer.keys + key, TILE * layer.k_dim, (uint16_t *)run.keys);
    codes_to_bf16((const int8_t *)layer.values + value, TILE * layer.v_dim, run.values);
    return Tile{run.keys, run.values, layer.key_scales + slot, layer.value_scales + slot};
}

// Finds a tile of a piece whose slots have shifts of their own.
static Tile turned_tile(const Heads &at, const Piece &piece, int head, int64_t number, Running &run) {
    Tile tile = tile_of(at, head, number, run);
    const bool f32 = at.kv_format == FORMAT_F32;
    if (tile.keys != run.keys) std::memcpy(run.keys, tile.keys, (f32 ? 4 : 2) * TILE * at.layer->k_dim);
    const int64_t place = number - piece.first_slot / TILE;
    turn_keys(*at.rope, piece.turns + place * 2 * at.rope->pairs * TILE, f32, run.keys);
    tile.keys = run.keys;
    return tile;
}

static void attend_piece(const Heads &at, const Piece &piece, int head, int queries, Running &run) {
    const Layer &layer = *at.layer;
    int64_t low = INT64_MAX, high = INT64_MIN;  // of the queries' positions
    for (int i = 0; i < queries; i++) {
        low = run.pos[i] < low ? run.pos[i] : low;
        high = run.pos[i] > high ? run.pos[i] : high;
    }
    for (int64_t number = piece.first_slot / TILE; number * TILE < piece.stop_slot; number++) {
        TileSlots slots;
        describe_tile(piece, number, slots);
        if (slots.low > high && !piece.pos) break;  // later tiles stand further on
        if (layer.window && !piece.pos && slots.high <= low - layer.window) continue;
        const Tile tile = piece.turns ? turned_tile(at, piece, head, number, run) : tile_of(at, head, number, run);
        for (int first = 0; first < queries; first += PLAIN_ROWS) {
            const int count = queries - first < PLAIN_ROWS ? queries - first : PLAIN_ROWS;
            if (!piece.pos) {  // rows that see nothing of the tile are passed over
                int64_t newest = INT64_MIN;
                for (int i = 0; i < count; i++) newest = run.pos[first + i] > newest ? run.pos[first + i] : newest;
                if (slots.low > newest) continue;
            }
            if (at.kv_format == FORMAT_F32)
                attend_rows<PLAIN_ROWS, FORMAT_F32>(layer, tile, slots, first, count, run);
            else if (at.kv_format == FORMAT_BF16)
                attend_rows<PLAIN_ROWS, FORMAT_BF16>(layer, tile, slots, first, count, run);
            else
                attend_rows<PLAIN_ROWS, FORMAT_INT8>(layer, tile, slots, first, count, run);
        }
    }
}

// Divides by the sum, a sink included; rows that saw nothing give zeros.
INLINE void finish_query(const Layer &layer, int head, const float *o, float most, float total, float *out) {
    if (layer.sinks && total > 0.0f) {
        const float sink = layer.sinks[head];
        if (sink - most > 80.0f) total = INFINITY;
        else total += std::exp(sink - most);
    }
    const float factor = total > 0.0f ? 1.0f / total : 0.0f;
    for (int i = 0; i < layer.v_dim; i += LANES) store(out + i, load<Floats>(o + i) * factor);
}

static void attend_item(const Heads &at, const Reads &reads, const Item &item, int head, Running &run) {
    const Layer &layer = *at.layer;
    const int repeat = layer.heads / layer.kv_heads, queries = item.num_rows * repeat;
    for (int i = 0; i < queries; i++) {
        run.most[i] = NEVER;
        run.total[i] = 0.0f;
    }
    std::memset(run.o, 0, sizeof(float) * queries * layer.v_dim);
    const float *turned = nullptr;
    bool loaded = false;
    for (int i = 0; i < item.num_pieces; i++) {
        const Piece &piece = reads.pieces[item.first_piece + i];
        if (!loaded || piece.turn != turned) load_queries(at, reads, item, head, piece.turn, run);
        loaded = true;
        turned = piece.turn;
        attend_piece(at, piece, head, queries, run);
    }
    for (int r = 0; r < item.num_rows; r++) {
        const int64_t row = reads.row_index[item.first_row + r];
        for (int j = 0; j < repeat; j++) {
            const int query = r * repeat + j, query_head = head * repeat + j;
            const float *o = run.o + query * layer.v_dim;
            if (item.partial < 0) {
                float *out = at.out + (row * layer.heads + query_head) * layer.v_dim;
                finish_query(layer, query_head, o, run.most[query], run.total[query], out);
                continue;
            }
            float *partial = at.partials + ((int64_t)(item.partial + r) * layer.heads + query_head) * (layer.v_dim + 2);
            std::memcpy(partial, o, sizeof(float) * layer.v_dim);
            partial[layer.v_dim] = run.most[query];
            partial[layer.v_dim + 1] = run.total[query];
        }
    }
}

static void merge_row(const Heads &at, const Reads &reads, int64_t row) {
    const Layer &layer = *at.layer;
    const int32_t first = reads.merge_offsets[row], stop = reads.merge_offsets[row + 1];
    if (first == stop) return;
    const int width = layer.v_dim + 2;
    for (int head = 0; head < layer.heads; head++) {
        float most = NEVER, total = 0.0f, o[MAX_DIM] = {};
        for (int32_t i = first; i < stop; i++) {
            const float *partial = at.partials + ((int64_t)reads.merge_partials[i] * layer.heads + head) * width;
            most = partial[layer.v_dim] > most ? partial[layer.v_dim] : most;
        }
        for (int32_t i = first; i < stop; i++) {
            const float *partial = at.partials + ((int64_t)reads.merge_partials[i] * layer.heads + head) * width;
            if (partial[layer.v_dim + 1] == 0.0f) continue;
            const float factor = std::exp(partial[layer.v_dim] - most);
            total += partial[layer.v_dim + 1] * factor;
            for (int d = 0; d < layer.v_dim; d += LANES)
                store(o + d, multiply_add(load<Floats>(partial + d), splat(factor), load<Floats>(o + d)));
        }
        finish_query(layer, head, o, most, total, at.out + (row * layer.heads + head) * layer.v_dim);
    }
}

// All items of a layer; `next` counts those that are taken, and is zero before.
static void attend(const Team &team, const Heads &at, const Reads &reads, int64_t num_rows,
                   std::atomic<int32_t> &next) {
    Running run;
    const int32_t work = reads.num_items * at.layer->kv_heads;
    for (;;) {
        const int32_t taken = next.fetch_add(1, std::memory_order_relaxed);
        if (taken >= work) break;
        const Item &item = reads.items[taken / at.layer->kv_heads];
        attend_item(at, reads, item, taken % at.layer->kv_heads, run);
    }
    if (reads.num_partials == 0) return;
#pragma omp barrier
    int64_t first, stop;
    share_of(team, num_rows, first, stop);
    for (int64_t row = first; row < stop; row++) merge_row(at, reads, row);
}
