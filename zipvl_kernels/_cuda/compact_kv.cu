// compact_kv_: kept rows of K and V move to the front of their buffers. moving.cuh says how.
//
// Compiled with LAYERS, how many there is room for, and what moving.cuh wants.

#include "moving.cuh"

struct Layer {
    char* k;             // [B, Hkv, N, D]; packed: [N, Hkv, D], all sequences one after the other
    char* v;             // the same
    const int* indices;  // [B, G, N]; packed: [G, N]
    const int* counts;   // [B, G]
};

struct Rows {
    char* first;
    long long stride;
    __device__ int page(int row) const { return 0; }
    __device__ char* at(int page, int row) const { return first + row * stride; }
};

struct Parameters {
    Layer layers[LAYERS];
    const int* dst_start;   // [B] or null
    const int* cu_seqlens;  // [B + 1]: packed, first row of each sequence and the end; or null
    unsigned* counters;     // the next ticket, blocks that are done, and a flag for every ticket
    long long k_b, k_h, k_n, v_b, v_h, v_n;                         // strides in bytes
    long long indices_b, indices_g, indices_n, counts_b, counts_g;  // strides in numbers
    int B, Hkv, G, N, longest, layer_count;
    unsigned most;  // tickets

    __device__ int first_row(int b) const { return cu_seqlens ? min(max(cu_seqlens[b], 0), N) : 0; }

    __device__ Set set(unsigned number) const {
        const int g = number % G, b = number / G % B;
        const Layer& layer = layers[number / G / B];
        const int start = first_row(b), length = min((cu_seqlens ? first_row(b + 1) : N) - start, longest);
        const int* const columns = layer.indices + b * indices_b + g * indices_g + start * indices_n;
        const int count = min(layer.counts[b * counts_b + g * counts_g], length);
        return {columns, indices_n, count, dst_start ? dst_start[b] : 0, 0, length};
    }

    __device__ Rows rows(unsigned number, int h, bool values) const {
        const int b = number / G % B, start = first_row(b);
        const Layer& layer = layers[number / G / B];
        return values ? Rows{layer.v + b * v_b + h * v_h + start * v_n, v_n}
                      : Rows{layer.k + b * k_b + h * k_h + start * k_n, k_n};
    }
};

static_assert(sizeof(Parameters) == 32 * LAYERS + 144, "as compact_kv.py packs them");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) compact_kv(const __grid_constant__ Parameters p) {
    after_previous_kernel();
    next_kernel_may_start();
    move_rows(p);
}
