// The rows whose attention scores the tokens, one launch: a thread draws a row, and its place is how many drawn rows are
// below it. Blocks after those that draw write the recent rows.
//
// Given from outside: THREADS of a block.

#include "dependent.cuh"
#include "permutation.cuh"

struct Params {
    int* rows;  // [random + recent]
    Permutation permutation;
    u32 random, recent;
};

static_assert(sizeof(Params) == 40, "the launcher packs so much");

extern "C" __global__ void __launch_bounds__(THREADS) probe_rows(const __grid_constant__ Params p) {
    __shared__ u32 drawn[THREADS];
    const u32 drawing = (p.random + THREADS - 1) / THREADS, thread = threadIdx.x;
    after_previous_kernel();
    next_kernel_may_start();
    if (blockIdx.x >= drawing) {
        const u32 i = (blockIdx.x - drawing) * THREADS + thread;
        if (i < p.recent) p.rows[p.random + i] = p.permutation.n + i;
        return;
    }
    const u32 draw = blockIdx.x * THREADS + thread;
    const u32 mine = draw < p.random ? permuted(p.permutation, draw) : 0;
    u32 below = 0;
    for (u32 block = 0; block < drawing; ++block) {
        const u32 first = block * THREADS, count = min(p.random - first, THREADS);
        __syncthreads();  // all have read those before
        drawn[thread] = block == blockIdx.x ? mine : thread < count ? permuted(p.permutation, first + thread) : 0;
        __syncthreads();
#pragma unroll 8
        for (u32 i = 0; i < count; ++i) below += drawn[i] < mine;
    }
    if (draw < p.random) p.rows[below] = mine;
}
