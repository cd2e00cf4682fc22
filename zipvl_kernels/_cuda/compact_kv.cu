// compact_kv_: kept rows of K and V move to the front of their buffers, in place and all of them at once.
//
// ROWS rows of the set are a tile, the tiles of one head's keys or values a chain. Row i of the set stands at or behind
// dst_start + i, so a row only moves towards the front, and what tile t overwrites is read by tiles up to t alone. A
// block reads its tile into registers, says so, waits for the tiles that read what it is about to overwrite, and
// writes. Tickets hand out tiles in order: whoever is waited for has started, and says that it has read before it waits
// for anybody, so nobody waits forever.
//
// Compiled with CHUNK_BYTES, the width of one load, CHUNKS, loads of a row, and LANES, threads to a row, a power of two.

#include "dependent.cuh"

#ifndef THREADS
#define THREADS 256
#define ITEMS 8  // rows of which a thread holds a chunk
#define BLOCKS_PER_SM 3
#endif

constexpr int AT_ONCE = THREADS / LANES, ROWS = AT_ONCE * ITEMS;
static_assert(CHUNKS <= LANES && LANES <= THREADS, "a thread holds at most one chunk of a row");

template <int BYTES> struct Bytes;
template <> struct Bytes<2> { using type = unsigned short; };
template <> struct Bytes<4> { using type = unsigned int; };
template <> struct Bytes<8> { using type = uint2; };
template <> struct Bytes<16> { using type = uint4; };
using Chunk = Bytes<CHUNK_BYTES>::type;

struct Parameters {
    char* k;               // [B, Hkv, N, D]
    char* v;               // [B, Hkv, N, D]
    const int* indices;    // [B, G, N]
    const int* counts;     // [B, G]
    const int* dst_start;  // [B] or null
    unsigned* counters;    // the next ticket, blocks that are done, which tiles have been read [tiles, B, Hkv, 2]
    long long k_b, k_h, k_n, v_b, v_h, v_n;            // strides in bytes
    long long indices_b, indices_g, indices_n, counts_b, counts_g;  // strides in numbers
    int B, Hkv, G, N;
};

__device__ void release(unsigned* flag) { asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory"); }

__device__ unsigned acquire(const unsigned* flag) {
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
    return x;
}

// The last of tiles 0 to `tile` whose first row stands at or before row `begin`, else 0. A warp, 32 tiles a step.
__device__ unsigned last_tile_before(const int* columns, long long stride, unsigned tile, int begin) {
    unsigned low = 0;
    for (unsigned size = tile; size;) {
        unsigned step = (size + 31) / 32;
        unsigned ahead = step * (threadIdx.x % 32 + 1);
        bool before = ahead <= size && columns[(long long)(low + ahead) * ROWS * stride] <= begin;
        unsigned steps = __popc(__ballot_sync(~0u, before));
        low += steps * step;
        size = min(step - 1, size - steps * step);
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) compact_kv(const __grid_constant__ Parameters p) {
    __shared__ int longest, last;
    __shared__ unsigned next[2];
    unsigned* const read = p.counters + 2;
    const unsigned chains = 2u * p.B * p.Hkv;
    after_previous_kernel();
    next_kernel_may_start();

    if (threadIdx.x == 0) {
        longest = 0;
        next[0] = atomicAdd(p.counters, 1);
    }
    __syncthreads();
    for (int set = threadIdx.x; set < p.B * p.G; set += THREADS)
        atomicMax(&longest, min(p.counts[set / p.G * p.counts_b + set % p.G * p.counts_g], p.N));
    __syncthreads();

    for (int turn = 0;; turn ^= 1) {
        const unsigned ticket = next[turn];
        const unsigned tile = ticket / chains, chain = ticket % chains;
        const long long first = (long long)tile * ROWS;  // row of the set
        if (first >= longest) break;                     // nor do later tickets have anything to move
        const int b = chain / 2 / p.Hkv, h = chain / 2 % p.Hkv, g = h % p.G;
        const int count = min(p.counts[b * p.counts_b + g * p.counts_g], p.N);
        const int* const columns = p.indices + b * p.indices_b + g * p.indices_g;
        const int begin = (int)first + (p.dst_start ? p.dst_start[b] : 0);
        const long long stride = chain % 2 ? p.v_n : p.k_n;
        char* const rows = chain % 2 ? p.v + b * p.v_b + h * p.v_h : p.k + b * p.k_b + h * p.k_h;

        // This thread's chunk of rows `row`, `row` + AT_ONCE, ... of the set, which go to `to` and so on.
        const int row = (int)first + threadIdx.x / LANES, to = begin + threadIdx.x / LANES;
        const int rest = threadIdx.x % LANES < CHUNKS ? count - row : 0;
        char* const mine = rows + threadIdx.x % LANES * CHUNK_BYTES;
        int from[ITEMS];
        const int* column = columns + row * p.indices_n;
#pragma unroll
        for (int i = 0; i < ITEMS; i++, column += AT_ONCE * p.indices_n)
            from[i] = i * AT_ONCE < rest ? *column : to + i * AT_ONCE;
        Chunk held[ITEMS];
        unsigned moves = 0;  // a bit an item
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (from[i] != to + i * AT_ONCE) {
                moves |= 1u << i;
                held[i] = *(const Chunk*)(mine + from[i] * stride);
            }
        unsigned reader = 0;
        if (threadIdx.x < 32 && first < count) reader = last_tile_before(columns, p.indices_n, tile, begin);

        const bool write = __syncthreads_or(moves);  // the tile has been read
        if (threadIdx.x == 0) {
            release(read + ticket);
            next[turn ^ 1] = atomicAdd(p.counters, 1);
        }
        // What the tile overwrites are as many rows as it has, so two tiles at most read them.
        if (write && threadIdx.x < 2 && reader + threadIdx.x < tile)
            while (!acquire(read + (long long)(reader + threadIdx.x) * chains + chain)) {}
        __syncthreads();
        char* at = mine + to * stride;
#pragma unroll
        for (int i = 0; i < ITEMS; i++, at += AT_ONCE * stride)
            if (moves >> i & 1) *(Chunk*)at = held[i];
    }

    // The last block puts the counters back.
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(p.counters + 1, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    const long long used = 2 + ((long long)longest + ROWS - 1) / ROWS * chains;
    for (long long i = threadIdx.x; i < used; i += THREADS) p.counters[i] = 0;
}
