// compact_paged_kv_: kept rows of K and V move to the front of each sequence's pages. moving.cuh says how.
//
// Whatever block tables, lengths and sets hold, what is written are rows of a sequence from its first writable one on,
// in pages of the pool.
//
// Compiled with PAGE, rows of a page, LAYERS, how many there is room for, and what moving.cuh wants.

#include "moving.cuh"

struct Layer {
    char* k;  // [num_blocks, PAGE, Hkv, D] or with PAGE and Hkv the other way round
    char* v;
    const int* indices;      // [B, G, W]
    const int* counts;       // [B, G]
    const int* block_table;  // [B, capacity / PAGE]
    const int* seqused_k;    // [B, G], or [B] with a stride of 0
};

struct Rows {
    char* first;
    long long stride_p, stride;
    const int* block_table;
    long long stride_t;
    unsigned num_blocks;

    // The page of a row, -1 where there is none.
    __device__ int page(int row) const {
        const int page = block_table[(unsigned)row / PAGE * stride_t];
        return (unsigned)page < num_blocks ? page : -1;
    }
    __device__ char* at(int page, int row) const { return first + page * stride_p + (unsigned)row % PAGE * stride; }
};

struct Parameters {
    Layer layers[LAYERS];
    const int* first_writable;  // [B] or null
    int* seqused;               // [layers, B, G]
    int* freed;                 // [layers, B]
    unsigned* counters;         // the next ticket, blocks that are done, and a flag for every ticket
    long long k_p, k_h, k_n, v_p, v_h, v_n;  // strides in bytes
    long long indices_b, indices_g, indices_n, counts_b, counts_g, table_b, table_n, used_b, used_g;  // and in numbers
    int B, Hkv, G, W, capacity, num_blocks, layer_count;

    // Rows that are used: no more than there can be, whatever the arguments say.
    __device__ int used(const Layer& layer, int b, int g) const {
        return min(max(layer.seqused_k[b * used_b + g * used_g], 0), capacity);
    }

    __device__ Set set(unsigned number) const {
        const int g = number % G, b = number / G % B;
        const Layer& layer = layers[number / G / B];
        const int length = used(layer, b, g);
        const int count = max(min(min(layer.counts[b * counts_b + g * counts_g], W), length), 0);
        const int first = first_writable ? max(first_writable[b], 0) : 0;
        return {layer.indices + b * indices_b + g * indices_g, indices_n, count, 0, first, length};
    }

    __device__ Rows rows(unsigned number, int h, bool values) const {
        const Layer& layer = layers[number / G / B];
        const int* const table = layer.block_table + number / G % B * table_b;
        return values ? Rows{layer.v + h * v_h, v_p, v_n, table, table_n, (unsigned)num_blocks}
                      : Rows{layer.k + h * k_h, k_p, k_n, table, table_n, (unsigned)num_blocks};
    }

    // New lengths, and how many pages hold none of a sequence's rows any more: the longest head decides.
    __device__ void report() const {
        const int threads = gridDim.x * THREADS;
        for (int i = blockIdx.x * THREADS + threadIdx.x; i < layer_count * B; i += threads) {
            int before = 0, after = 0;
            for (int g = 0; g < G; g++) {
                const int count = set(i * G + g).count;
                seqused[i * G + g] = count;
                before = max(before, used(layers[i / B], i % B, g));
                after = max(after, count);
            }
            freed[i] = pages(before) - pages(after);
        }
    }

    __device__ static int pages(int rows) { return rows / PAGE + (rows % PAGE > 0); }
};

static_assert(sizeof(Parameters) == 48 * LAYERS + 184, "as compact_paged_kv.py packs them");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
compact_paged_kv(const __grid_constant__ Parameters p) {
    after_previous_kernel();
    next_kernel_may_start();
    p.report();
    move_rows(p);
}
