// Kept keys and values move to the front of their buffers: in place, in parallel, in one launch.
//
// A chain is one head of k or of v. Its set is cut into tiles of ROWS members, which only ever move towards the front,
// so a tile overwrites rows that no later tile reads. A block draws a tile by ticket, reads its rows into registers,
// says so in the chain's flags, waits until every earlier tile of the chain has said so, and writes. Tickets are drawn
// in order: whoever is waited for has started, and the least of them waits for nobody, so there is no deadlock however
// few blocks run at a time. A block draws its next ticket early, but waits for less than that ticket meanwhile.
//
// Given from outside: THREADS; WIDTH 2, 4, 8 or 16, the bytes of a load; VECTORS, the loads of a row; ROWS of a tile.

using u32 = unsigned int;
using i64 = long long;

constexpr u32 ALL = 0xFFFFFFFFu;
constexpr int EACH = (ROWS * VECTORS + THREADS - 1) / THREADS;  // loads of a thread

struct alignas(WIDTH) Vector {
#if WIDTH == 2
    unsigned short bytes;
#else
    u32 bytes[WIDTH / 4];
#endif
};

struct Params {
    char *k, *v;           // [B, Hkv, N, D]
    const int* indices;    // [B, G, N]
    const int* counts;     // [B, G]
    const int* dst_start;  // [B] or null
    u32* state;            // tickets drawn, blocks done, HEADER, then flags a chain: a bit a tile; 0 before and after
    i64 k_b, k_h, k_n, v_b, v_h, v_n;  // bytes
    i64 i_b, i_g, i_n, c_b, c_g;
    int B, Hkv, G;
    int words;  // of flags a chain
};

constexpr int HEADER = 32;

// --- machine -------------------------------------------------------------------------------------------------------

// What the block has read until now, it has read before anyone sees these bits.
__device__ __forceinline__ void publish(u32* word, u32 bits) {
    asm volatile("red.release.gpu.global.or.b32 [%0], %1;" ::"l"(word), "r"(bits) : "memory");
}

__device__ __forceinline__ u32 published(const u32* word) {
    u32 bits;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(bits) : "l"(word) : "memory");
    return bits;
}

__device__ __forceinline__ bool last_of(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before == gridDim.x - 1;
}

// --- the kernel ----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS) compact_kv(const __grid_constant__ Params p) {
    __shared__ u32 drawn;
    __shared__ int most;
    __shared__ bool last;
    const u32 chains = 2 * p.B * p.Hkv;
    if (threadIdx.x == 0) drawn = atomicAdd(p.state, 1), most = 0;
    __syncthreads();
    int longest = 0;
    for (int i = threadIdx.x; i < p.B * p.G; i += THREADS)
        longest = max(longest, p.counts[i / p.G * p.c_b + i % p.G * p.c_g]);
    if (longest) atomicMax(&most, longest);
    __syncthreads();
    const u32 tickets = (u32)((most + ROWS - 1) / ROWS) * chains;

    u32 ticket = drawn;
    while (ticket < tickets) {
        const u32 tile = ticket / chains, chain = ticket % chains;
        const i64 b = chain / 2 / p.Hkv, h = chain / 2 % p.Hkv, g = h % p.G;
        char* const rows = chain % 2 ? p.v + b * p.v_b + h * p.v_h : p.k + b * p.k_b + h * p.k_h;
        const i64 stride = chain % 2 ? p.v_n : p.k_n;
        const int* const indices = p.indices + b * p.i_b + g * p.i_g;
        const int from = tile * ROWS, end = min(p.counts[b * p.c_b + g * p.c_g], from + ROWS);
        const int to = p.dst_start ? p.dst_start[b] : 0;
        u32 next;
        if (threadIdx.x == 0) next = atomicAdd(p.state, 1);

        int source[EACH];  // of each load; -1 where the row stands where it should, or there is none
        Vector taken[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = from + (e * THREADS + threadIdx.x) / VECTORS;
            source[e] = i < end ? indices[i * p.i_n] : -1;
            if (source[e] == i + to) source[e] = -1;
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int column = (e * THREADS + threadIdx.x) % VECTORS;
            if (source[e] >= 0) taken[e] = *(const Vector*)(rows + source[e] * stride + column * WIDTH);
        }
        __syncthreads();

        u32* const flags = p.state + HEADER + (i64)chain * p.words;
        if (threadIdx.x == 0) {
            publish(flags + tile / 32, 1u << tile % 32);
            drawn = next;
        }
        if (threadIdx.x < 32 && from < end)
            for (u32 word = threadIdx.x; word <= tile / 32; word += 32) {
                const u32 earlier = word < tile / 32 ? ALL : (1u << tile % 32) - 1;
                while ((published(flags + word) & earlier) != earlier) {}
            }
        __syncthreads();
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int at = e * THREADS + threadIdx.x;
            if (source[e] >= 0) *(Vector*)(rows + (i64)(from + at / VECTORS + to) * stride + at % VECTORS * WIDTH) = taken[e];
        }
        ticket = drawn;
    }

    // The last block to come here leaves zeros.
    if (threadIdx.x == 0) last = last_of(p.state + 1);
    __syncthreads();
    if (last)
        for (i64 i = threadIdx.x; i < HEADER + (i64)chains * p.words; i += THREADS) p.state[i] = 0;
}
