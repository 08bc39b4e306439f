// kvloom's compiled library: the functions that Python calls, on pointers that it owns.
//
// Knows: how a team of OpenMP threads runs one function. Allocates nothing and keeps no state.
#include <new>

#ifdef _OPENMP
#include <omp.h>
#else  // a team of one
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

#include "step.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

template <class Work> static void together([[maybe_unused]] int threads, Work work) {
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads()});
}

EXPORT int32_t kvloom_abi() { return KVLOOM_ABI; }
EXPORT const char *kvloom_level() { return LEVEL_NAME; }

// Whether this CPU can run what was compiled.
EXPORT int32_t kvloom_runs_here();

EXPORT int64_t kvloom_workspace_bytes(const Model *model, int64_t rows, int64_t partials) {
    int64_t bytes;
    cut_workspace(*model, rows, partials, nullptr, &bytes);
    return bytes;
}

EXPORT int32_t kvloom_step(const Model *model, const Step *step, int32_t threads) {
    int64_t partials = 0, bytes;
    for (int i = step->first_layer; i < step->stop_layer; i++)
        partials = widest(partials, step->reads[model->layers[i].reads].num_partials);
    const int64_t rows = widest(step->num_rows, step->num_logits);
    Buffers buffers = cut_workspace(*model, rows, partials, step->workspace, &bytes);
    if (bytes > step->workspace_bytes) return 1;
    for (int i = 0; i < model->num_layers; i++) new (&buffers.next[i]) std::atomic<int32_t>(0);
    together(threads, [&](Team team) { run_step(team, buffers, *model, *step); });
    return 0;
}

EXPORT void kvloom_norm(const Norm *norm, const float *x, int64_t rows, float *out, int32_t threads) {
    together(threads, [&](Team team) {
        int64_t first, stop;
        share_of(team, rows, first, stop);
        for (int64_t row = first; row < stop; row++)
            norm_row(*norm, x + row * norm->width, out + row * norm->width);
    });
}

// Quantises rows to int8; see `Operand`.
EXPORT void kvloom_quantize_rows(const float *x, int64_t rows, int32_t inputs, int8_t *codes, float *scales,
                                 int32_t *counts, float *sums) {
    Operand operand{};
    operand.format = FORMAT_INT8;
    operand.inputs = inputs;
    operand.codes = codes;
    operand.scales = scales;
    operand.counts = counts;
    operand.sums = sums;
    for (int64_t row = 0; row < rows; row++) set_operand(operand, row, x + row * inputs, 0, inputs);
}

EXPORT int64_t kvloom_operand_bytes(int64_t rows, int32_t format, int32_t inputs) {
    int64_t bytes;
    cut_operand(nullptr, rows, format, inputs, &bytes);
    return bytes;
}

EXPORT void kvloom_linear(const Weight *weight, const float *x, int64_t rows, float *out, int32_t add, float scale,
                          void *workspace, int32_t threads) {
    Buffers buffers{};
    buffers.operand = (char *)workspace;
    together(threads, [&](Team team) {
        Norm none{};
        Operand operand = operand_of(team, buffers, rows, none, x, weight->inputs, *weight);
        linear(team, operand, rows, weight, 1, Target{out, weight->outputs, add != 0, scale});
    });
}

EXPORT void kvloom_gate(int32_t activation, const float *gate, const float *up, int64_t rows, int32_t width,
                        float *out, int32_t threads) {
    together(threads, [&](Team team) {
        int64_t first, stop;
        share_of(team, rows, first, stop);
        for (int64_t row = first; row < stop; row++)
            gate_part(activation, gate ? gate + row * width : nullptr, up + row * width, out + row * width, 0, width);
    });
}

EXPORT void kvloom_likeliest(const float *logits, int64_t rows, int64_t width, int64_t *out) {
    for (int64_t row = 0; row < rows; row++) out[row] = index_of_largest(logits + row * width, width);
}

EXPORT void kvloom_embed(const Weight *weight, const int64_t *tokens, int64_t rows, float scale, float *out) {
    for (int64_t row = 0; row < rows; row++) embed_row(*weight, tokens[row], scale, out + row * weight->inputs);
}

// Puts rotated keys and values, (rows, kv_heads, dim), into the arena of a layer.
EXPORT void kvloom_put(const Layer *layer, int32_t kv_format, int64_t slots, const int64_t *write_slots, int64_t rows,
                       const float *k, const float *v) {
    const Arena keys = keys_of(*layer, kv_format, slots), values = values_of(*layer, kv_format, slots);
    for (int64_t row = 0; row < rows; row++)
        for (int head = 0; head < layer->kv_heads; head++) {
            const int64_t place = row * layer->kv_heads + head;
            put_key(keys, head, write_slots[row], k + place * layer->k_dim);
            put_value(values, head, write_slots[row], v + place * layer->v_dim);
        }
}

EXPORT void kvloom_rotate(const RopeTable *rope, float *x, int64_t rows, int32_t heads, int32_t dims) {
    for (int64_t row = 0; row < rows; row++)
        for (int head = 0; head < heads; head++) rotate_head(*rope, row, x + (row * heads + head) * dims);
}

// Attention of rotated queries (rows, heads, k_dim) over a layer's arena.
EXPORT void kvloom_attend(const Layer *layer, int32_t kv_format, int64_t slots, const Reads *reads,
                          const RopeTable *rope, const int64_t *pos, const float *q, int64_t rows, float *out,
                          float *partials, int32_t threads) {
    std::atomic<int32_t> next(0);
    together(threads, [&](Team team) {
        Heads heads{layer, kv_format, slots, rope, pos, q, (int64_t)layer->heads * layer->k_dim, out, partials};
        attend(team, heads, *reads, rows, next);
    });
}

EXPORT int32_t kvloom_runs_here() {
#if defined(LEVEL_AVX512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16");
#elif defined(LEVEL_AVX2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}
