// The C interface: plain structs over memory that the caller owns.
//
// Knows: sizes, pointers and flags. Does not know: who allocated, or why a step is shaped as it is.
// `kvloom/ops/native/abi.py` mirrors these structs field by field.
#pragma once
#include <cstdint>

#define KVLOOM_ABI 5

enum Format : int32_t { FORMAT_F32 = 0, FORMAT_BF16 = 1, FORMAT_INT8 = 2, FORMAT_INT4 = 3 };
enum NormKind : int32_t { NORM_NONE = 0, NORM_RMS = 1, NORM_LAYER = 2 };
enum Activation : int32_t { ACTIVATION_SILU = 0, ACTIVATION_GELU = 1, ACTIVATION_GELU_TANH = 2 };

// A packed matrix (outputs x inputs); `packing.py` describes the layouts.
struct Weight {
    int32_t format;
    int32_t outputs;
    int32_t inputs;
    int32_t reserved;
    const void *codes;
    const void *scales;  // int8 only: fp16 per group of 32 inputs
    const float *bias;   // or null
};

struct Norm {
    int32_t kind;
    int32_t width;  // values that are normalised together
    float epsilon;
    int32_t stretches;    // rows of `weight` and `bias`, which are taken in turn
    const float *weight;  // or null
    const float *bias;    // or null
};

struct Layer {
    Norm input_norm;
    Norm q_norm;
    Norm k_norm;
    Norm attention_norm;  // of the attention's output
    Norm mlp_norm;        // before the MLP
    Norm output_norm;     // of the MLP's output
    Weight projections[3];  // q, k, v
    Weight output;
    Weight gate;  // no codes: not gated
    Weight up;
    Weight down;
    int32_t heads;
    int32_t kv_heads;
    int32_t k_dim;
    int32_t v_dim;
    int32_t rope;    // index of the step's tables; -1 for none
    int32_t window;  // positions seen; 0 for all
    int32_t reads;   // index of the step's reads
    int32_t activation;
    int32_t parallel;  // MLP and attention read the same normed rows
    float scale;
    float softcap;  // 0 for none
    float residual_scale;
    const float *sinks;  // per head, or null
    void *keys;          // arena of the layer (kv_heads, slots, k_dim) in tiles of 64 slots
    void *values;
    float *key_scales;  // int8 only: per head and slot
    float *value_scales;
};

struct Model {
    int32_t num_layers;
    int32_t hidden;
    int32_t kv_format;  // FORMAT_F32, FORMAT_BF16 or FORMAT_INT8
    int32_t reserved;
    int64_t slots;  // of the arena
    const Layer *layers;
    Weight embedding;
    Weight head;
    Norm final_norm;
    float embedding_scale;
    float logit_scale;
    float logit_softcap;  // 0 for none
    int32_t reserved2;
};

struct RopeTable {  // cos and sin per packed row and pair
    const float *cos;
    const float *sin;
    int32_t pairs;
    int32_t first_dim;
    int32_t interleaved;
    int32_t reserved;
};

// A stretch of slots at neighbouring positions (or at `pos`).
struct Piece {
    int64_t first_slot;
    int64_t stop_slot;
    int64_t first_pos;   // position now of the first slot
    int64_t shift;       // added to `pos`
    const float *turn;   // cos, then sin, per pair: turns the query by -shift; or null
    const float *bias;   // per slot, or null
    const int32_t *pos;  // per slot, or null
    // Per tile, from the first slot's on: cos, then sin, per pair and slot. Turns its keys to where
    // they stand now, each by a shift of its own; or null.
    const float *turns;
};

// Rows that read the same pieces, as one unit of work per KV head.
struct Item {
    int32_t first_row;  // into `row_index`
    int32_t num_rows;
    int32_t first_piece;
    int32_t num_pieces;
    int32_t partial;  // first partial row; -1: the result is final
    int32_t reserved;
};

struct Reads {
    int32_t num_items;
    int32_t num_partials;
    const Item *items;
    const Piece *pieces;
    const int32_t *row_index;      // packed rows of the items
    const int32_t *merge_offsets;  // per packed row: where its partials start in `merge_partials`
    const int32_t *merge_partials;
};

struct Step {
    int32_t num_rows;
    int32_t first_layer;
    int32_t stop_layer;
    int32_t num_logits;
    const int64_t *tokens;  // null: `hidden` holds the rows already
    const int64_t *pos;
    const int64_t *write_slots;
    const RopeTable *ropes;
    const Reads *reads;
    float *hidden;               // (rows, hidden)
    float *qkv;                  // (rows, widest q + k + v): rotated q, k and v of the last layer run
    const int32_t *logit_rows;
    float *logits;  // (num_logits, vocabulary)
    void *workspace;
    int64_t workspace_bytes;
    int32_t only_keys;  // the last layer ends with its keys and values: nobody reads what follows
    int32_t reserved;
    int32_t *likeliest;  // (num_logits): index of each row's largest logit, or null
};
