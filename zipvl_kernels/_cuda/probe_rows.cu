// The rows whose attention scores the tokens, one launch: a thread draws a row, and its place is how many drawn rows are
// below it. Blocks after those that draw write the recent rows.
//
// Given from outside: THREADS of a block, and PACKED 1 for sequences one after the other, whose lengths only the device
// knows: each has blocks and rows as for the longest one, and -1 where it needs fewer.

#include "dependent.cuh"
#include "packed.cuh"
#include "permutation.cuh"

struct Params {
    int* rows;                // [random + recent], or [B, random + recent]
    const int* cu_seqlens;    // [B + 1] if PACKED
    Permutation permutation;  // of one sequence; if PACKED, its key alone counts
    u32 random, recent;       // rows of each kind
    int B, T, most;           // if PACKED: sequences, rows of all, and of the longest
};

static_assert(sizeof(Params) == 56, "the launcher packs so much");

extern "C" __global__ void __launch_bounds__(THREADS) probe_rows(const __grid_constant__ Params p) {
    __shared__ u32 drawn[THREADS];
    const u32 thread = threadIdx.x;
    after_previous_kernel();
    next_kernel_may_start();
    u32 drawing = (p.random + THREADS - 1) / THREADS, block = blockIdx.x, random = p.random, recent = p.recent;
    const u32 all = random + recent, resting = (recent + THREADS - 1) / THREADS;
    Permutation permutation = p.permutation;
    int* rows = p.rows;
    if (PACKED) {
        const u32 b = block / (drawing + resting), n = span_of({p.cu_seqlens, p.B, p.T, p.most}, b).rows;
        block %= drawing + resting, rows += (long long)b * all;
        recent = min(recent, n), random = min(random, n - recent);
        permutation = permutation_of(p.permutation.key, n - recent);
    }
    if (block >= drawing) {
        const u32 i = (block - drawing) * THREADS + thread;
        if (i < recent) rows[random + i] = permutation.n + i;
        if (PACKED)
            for (u32 j = random + recent + i; j < all; j += resting * THREADS) rows[j] = -1;
        return;
    }
    drawing = (random + THREADS - 1) / THREADS;
    const u32 draw = block * THREADS + thread;
    const u32 mine = draw < random ? permuted(permutation, draw) : 0;
    u32 below = 0;
    for (u32 other = 0; other < drawing; ++other) {
        const u32 first = other * THREADS, count = min(random - first, THREADS);
        __syncthreads();  // all have read those before
        drawn[thread] = other == block ? mine : thread < count ? permuted(permutation, first + thread) : 0;
        __syncthreads();
#pragma unroll 8
        for (u32 i = 0; i < count; ++i) below += drawn[i] < mine;
    }
    if (draw < random) rows[below] = mine;
}
