// A whole step: embedding, layers and head, run by a team between barriers.
//
// Knows: the order of a layer, and how the workspace is cut.
// Does not know: model families; what varies are pointers and flags of `Layer`.
#pragma once
#include "attention.h"

// Cuts the caller's workspace; with a null base it only counts.
struct Cutter {
    char *base;
    int64_t used;
    template <class T> T *take(int64_t count) {
        used = (used + 63) & ~63LL;
        T *place = base ? (T *)(base + used) : nullptr;
        used += count * (int64_t)sizeof(T);
        return place;
    }
};

struct Buffers {
    std::atomic<int32_t> *next;  // one counter per layer
    float *normed;
    float *mixed;     // attention output, and MLP rows
    float *branch;    // what a branch adds to the residual, where it is normed first
    float *gate;
    float *up;
    float *partials;
    char *operand;  // cut again by each product
    int64_t operand_bytes;
};

INLINE int64_t widest(int64_t a, int64_t b) { return a > b ? a : b; }

static Operand cut_operand(char *base, int64_t rows, int32_t format, int32_t inputs, int64_t *bytes) {
    Cutter cutter{base, 0};
    Operand operand{};
    operand.format = format;
    operand.inputs = inputs;
    if (format == FORMAT_F32) operand.floats = cutter.take<float>(rows * inputs);
    else if (format == FORMAT_BF16) operand.pairs = cutter.take<uint32_t>(rows * ((inputs + 1) / 2));
    else {
        operand.codes = cutter.take<int8_t>(rows * inputs);
        operand.scales = cutter.take<float>(rows * (inputs / GROUP));
        operand.sums = cutter.take<float>(rows * (inputs / GROUP));
        operand.counts = cutter.take<int32_t>(rows * (inputs / GROUP));
    }
    if (bytes) *bytes = cutter.used;
    return operand;
}

static Buffers cut_workspace(const Model &model, int64_t rows, int64_t partials, void *base, int64_t *bytes) {
    int64_t mixed = 0, mlp = 0, inputs = model.hidden, partial = 0;
    for (int i = 0; i < model.num_layers; i++) {
        const Layer &layer = model.layers[i];
        mixed = widest(mixed, (int64_t)layer.heads * layer.v_dim);
        mlp = widest(mlp, layer.up.outputs);
        partial = widest(partial, (int64_t)layer.heads * (layer.v_dim + 2));
    }
    inputs = widest(inputs, widest(mixed, mlp));
    Buffers buffers{};
    Cutter cutter{(char *)base, 0};
    buffers.next = cutter.take<std::atomic<int32_t>>(model.num_layers);
    buffers.normed = cutter.take<float>(rows * inputs);
    buffers.mixed = cutter.take<float>(rows * mixed);
    buffers.branch = cutter.take<float>(rows * model.hidden);
    buffers.gate = cutter.take<float>(rows * mlp);
    buffers.up = cutter.take<float>(rows * mlp);
    buffers.partials = cutter.take<float>(partials * partial);
    buffers.operand_bytes = rows * (inputs + 64) * (int64_t)sizeof(float);
    buffers.operand = cutter.take<char>(buffers.operand_bytes);
    *bytes = cutter.used;
    return buffers;
}

// Calls work(row, first, stop) for a member's share of all rows' values, in whole groups.
template <class Work> INLINE void share_values(const Team &team, int64_t rows, int width, Work work) {
    const int parts = width % GROUP ? 1 : width / GROUP;
    int64_t first, stop;
    share_of(team, rows * parts, first, stop);
    while (first < stop) {
        const int64_t row = first / parts, begin = first % parts;
        const int64_t end = stop - row * parts < parts ? stop - row * parts : parts;
        if (parts == 1) work(row, 0, width);
        else work(row, (int)begin * GROUP, (int)end * GROUP);
        first = (row + 1) * parts;
    }
}

// Norms rows and makes them the operand of the next product.
static Operand operand_of(const Team &team, const Buffers &buffers, int64_t rows, const Norm &norm,
                          const float *x, int64_t stride, const Weight &weight) {
    Operand operand = cut_operand(buffers.operand, rows, weight.format, weight.inputs, nullptr);
    share_values(team, rows, weight.inputs, [&](int64_t row, int first, int stop) {
        const float *from = x + row * stride;
        if (norm.kind != NORM_NONE) {
            float *normed = buffers.normed + row * weight.inputs;
            norm_part(norm, spread_of(norm, from), from, normed, first, stop);
            from = normed;
        }
        set_operand(operand, row, from, first, stop);
    });
#pragma omp barrier
    return operand;
}

// Norms q and k, rotates them, and puts k and v into the arena.
static void rotate_and_put(const Team &team, const Model &model, const Layer &layer, const Step &step,
                           int64_t width) {
    const int q_width = layer.heads * layer.k_dim, k_width = layer.kv_heads * layer.k_dim;
    const int vectors = layer.heads + 2 * layer.kv_heads;
    const RopeTable *rope = layer.rope < 0 ? nullptr : step.ropes + layer.rope;
    const Arena keys = keys_of(layer, model.kv_format, model.slots);
    const Arena values = values_of(layer, model.kv_format, model.slots);
    int64_t first, stop;
    const bool whole_q = layer.q_norm.kind != NORM_NONE && layer.q_norm.width != layer.k_dim;
    const bool whole_k = layer.k_norm.kind != NORM_NONE && layer.k_norm.width != layer.k_dim;
    if (whole_q || whole_k) {  // over all heads together
        share_of(team, step.num_rows, first, stop);
        for (int64_t row = first; row < stop; row++) {
            float *x = step.qkv + row * width;
            if (whole_q) norm_row(layer.q_norm, x, x);
            if (whole_k) norm_row(layer.k_norm, x + q_width, x + q_width);
        }
#pragma omp barrier
    }
    share_of(team, (int64_t)step.num_rows * vectors, first, stop);
    for (int64_t unit = first; unit < stop; unit++) {
        const int64_t row = unit / vectors;
        const int vector = (int)(unit % vectors), key = vector - layer.heads, value = key - layer.kv_heads;
        float *x = step.qkv + row * width;
        if (value >= 0) {
            x += q_width + k_width + value * layer.v_dim;
            put_value(values, value, step.write_slots[row], x);
            continue;
        }
        x += key < 0 ? vector * layer.k_dim : q_width + key * layer.k_dim;
        const Norm &norm = key < 0 ? layer.q_norm : layer.k_norm;
        if (norm.kind != NORM_NONE && norm.width == layer.k_dim) {
            Norm own = norm;
            const int64_t offset = norm.stretches > 1 ? (int64_t)(key < 0 ? vector : key) * norm.width : 0;
            if (own.weight) own.weight += offset;
            if (own.bias) own.bias += offset;
            norm_row(own, x, x);
        }
        if (rope) rotate_head(*rope, row, x);
        if (key >= 0) put_key(keys, key, step.write_slots[row], x);
    }
#pragma omp barrier
}

// hidden (+)= norm(scale * branch)
static void add_normed(const Team &team, const Step &step, const Norm &norm, float *branch,
                       int64_t hidden, float scale) {
    int64_t first, stop;
    share_of(team, step.num_rows, first, stop);
    for (int64_t row = first; row < stop; row++) {
        float *x = branch + row * hidden, *out = step.hidden + row * hidden;
        norm_row(norm, x, x);
        for (int64_t i = 0; i < hidden; i++) out[i] += scale * x[i];
    }
#pragma omp barrier
}

// Adds a product to the residual, normed first where the layer says so.
static void add_branch(const Team &team, const Buffers &buffers, const Model &model, const Layer &layer,
                       const Step &step, const Operand &x, const Weight &weight, const Norm &norm) {
    const bool normed = norm.kind != NORM_NONE;
    Target target{normed ? buffers.branch : step.hidden, model.hidden, !normed, normed ? 1.0f : layer.residual_scale};
    linear(team, x, step.num_rows, &weight, 1, target);
#pragma omp barrier
    if (normed) add_normed(team, step, norm, buffers.branch, model.hidden, layer.residual_scale);
}

static void run_mlp(const Team &team, const Buffers &buffers, const Model &model, const Layer &layer,
                    const Step &step, const Norm &norm, const float *x) {
    const int64_t rows = step.num_rows, width = layer.up.outputs;
    Operand operand = operand_of(team, buffers, rows, norm, x, model.hidden, layer.up);
    const bool gated = layer.gate.codes != nullptr;
    if (gated) linear(team, operand, rows, &layer.gate, 1, Target{buffers.gate, width, false, 1.0f});
    linear(team, operand, rows, &layer.up, 1, Target{buffers.up, width, false, 1.0f});
#pragma omp barrier
    Operand inner = cut_operand(buffers.operand, rows, layer.down.format, layer.down.inputs, nullptr);
    share_values(team, rows, (int)width, [&](int64_t row, int first, int stop) {
        float *up = buffers.up + row * width;
        gate_part(layer.activation, gated ? buffers.gate + row * width : nullptr, up, up, first, stop);
        set_operand(inner, row, up, first, stop);
    });
#pragma omp barrier
    add_branch(team, buffers, model, layer, step, inner, layer.down, layer.output_norm);
}

static void run_layer(const Team &team, const Buffers &buffers, const Model &model, int index, const Step &step,
                      bool only_keys) {
    const Layer &layer = model.layers[index];
    const int64_t rows = step.num_rows;
    const int64_t width = (int64_t)(layer.heads + layer.kv_heads) * layer.k_dim + (int64_t)layer.kv_heads * layer.v_dim;
    Operand operand = operand_of(team, buffers, rows, layer.input_norm, step.hidden, model.hidden, layer.projections[0]);
    linear(team, operand, rows, layer.projections, 3, Target{step.qkv, width, false, 1.0f});
    float *parallel_input = nullptr;
    if (layer.parallel) {  // the MLP reads what attention read, before the residual changes
        parallel_input = layer.input_norm.kind == NORM_NONE ? buffers.branch : buffers.normed;
        if (layer.input_norm.kind == NORM_NONE && team.id == 0)
            std::memcpy(parallel_input, step.hidden, sizeof(float) * rows * model.hidden);
    }
#pragma omp barrier
    rotate_and_put(team, model, layer, step, width);
    if (only_keys) return;
    Heads heads{&layer, model.kv_format, model.slots, layer.rope < 0 ? nullptr : step.ropes + layer.rope,
                step.pos, step.qkv, width, buffers.mixed, buffers.partials};
    attend(team, heads, step.reads[layer.reads], rows, buffers.next[index]);
#pragma omp barrier
    Norm none{};
    operand = operand_of(team, buffers, rows, none, buffers.mixed, (int64_t)layer.heads * layer.v_dim, layer.output);
    add_branch(team, buffers, model, layer, step, operand, layer.output, layer.attention_norm);
    if (layer.parallel)
        run_mlp(team, buffers, model, layer, step, none, parallel_input);
    else
        run_mlp(team, buffers, model, layer, step, layer.mlp_norm, step.hidden);
}

static void run_head(const Team &team, const Buffers &buffers, const Model &model, const Step &step) {
    int64_t first, stop;
    const int64_t rows = step.num_logits;
    share_of(team, rows, first, stop);
    Operand operand = cut_operand(buffers.operand, rows, model.head.format, model.head.inputs, nullptr);
    for (int64_t i = first; i < stop; i++) {
        float *normed = buffers.normed + i * model.hidden;
        norm_row(model.final_norm, step.hidden + (int64_t)step.logit_rows[i] * model.hidden, normed);
        set_operand(operand, i, normed, 0, (int)model.hidden);
    }
#pragma omp barrier
    linear(team, operand, rows, &model.head, 1, Target{step.logits, model.head.outputs, false, model.logit_scale});
    if (model.logit_softcap > 0.0f) {
#pragma omp barrier
        share_of(team, rows * model.head.outputs, first, stop);
        for (int64_t i = first; i < stop; i++)
            step.logits[i] = std::tanh(step.logits[i] / model.logit_softcap) * model.logit_softcap;
    }
    if (!step.likeliest) return;
#pragma omp barrier
    share_of(team, rows, first, stop);
    for (int64_t i = first; i < stop; i++)
        step.likeliest[i] = (int32_t)index_of_largest(step.logits + i * model.head.outputs, model.head.outputs);
}

static void run_step(const Team &team, const Buffers &buffers, const Model &model, const Step &step) {
    if (step.tokens) {
        int64_t first, stop;
        share_of(team, step.num_rows, first, stop);
        for (int64_t row = first; row < stop; row++)
            embed_row(model.embedding, step.tokens[row], model.embedding_scale, step.hidden + row * model.hidden);
#pragma omp barrier
    }
    for (int i = step.first_layer; i < step.stop_layer; i++)
        run_layer(team, buffers, model, i, step, step.only_keys && i + 1 == step.stop_layer);
    if (step.num_logits) run_head(team, buffers, model, step);
}
