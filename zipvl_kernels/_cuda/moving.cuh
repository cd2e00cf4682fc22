// How kept rows of K and V move to the front of where they stand, in place and all of them at once. compact_kv.cu and
// compact_paged_kv.cu say where that is.
//
// ROWS rows of a set are a tile, the tiles of one head's keys or values a chain. A row only moves towards the front, and
// sets ascend, so what tile t overwrites is read by tiles up to t alone. A block reads its tile into registers, says so,
// waits for the tiles that read what it is about to overwrite, and writes. Tickets hand out tiles in order, one set after
// the other: whoever is waited for has a lower ticket, so it has started, and a block says that it has read before it
// waits for anybody. So nobody waits forever, however many blocks, sequences and layers there are.
//
// Compiled with CHUNK_BYTES, the width of one load, CHUNKS, loads of a row, LANES, threads to a row, a power of two, and
// PIECES, into how many pieces rows are cut that are longer than what all threads load; a piece then is as a head.

#include "dependent.cuh"

#ifndef THREADS
#define THREADS 256
#define ITEMS 8  // rows of which a thread holds a chunk
#define BLOCKS_PER_SM 3
#endif

constexpr int AT_ONCE = THREADS / LANES, ROWS = AT_ONCE * ITEMS;
static_assert(CHUNKS <= LANES && LANES <= THREADS, "a thread holds at most one chunk of a row");
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "first tickets are found by one warp, in two steps");

template <int BYTES> struct Bytes;
template <> struct Bytes<2> { using type = unsigned short; };
template <> struct Bytes<4> { using type = unsigned int; };
template <> struct Bytes<8> { using type = uint2; };
template <> struct Bytes<16> { using type = uint4; };
using Chunk = Bytes<CHUNK_BYTES>::type;

// Rows that move together: those of one sequence and group of heads in one layer.
struct Set {
    const int* columns;  // ascending
    long long stride;    // of columns
    int count;           // how many
    int to;              // the row that the first one goes to
    int first;           // rows before it are not written
    int length;          // rows from it on are not read
};

__device__ void release(unsigned* flag) { asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory"); }

__device__ unsigned acquire(const unsigned* flag) {
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
    return x;
}

// Sum of `x` over this and earlier lanes.
__device__ unsigned sum_so_far(unsigned x) {
    for (int step = 1; step < 32; step *= 2) {
        unsigned before = __shfl_up_sync(~0u, x, step);
        if (threadIdx.x % 32 >= step) x += before;
    }
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

// Which set each ticket is of. Sets are many, so a thread adds up the tickets of a run of them.
template <class Parameters> struct Tickets {
    static constexpr int PART = THREADS / 32;
    const Parameters& p;
    unsigned* const firsts;  // [THREADS + 1] in shared memory: the first ticket of each run, and how many there are
    const unsigned chains, sets, run;

    __device__ Tickets(const Parameters& p, unsigned* firsts)
        : p(p), firsts(firsts), chains(2 * PIECES * (p.Hkv / p.G)), sets(p.layer_count * p.B * p.G),
          run((sets + THREADS - 1) / THREADS) {}

    __device__ unsigned of_set(unsigned set) const {
        return set < sets ? (max(p.set(set).count, 0) + ROWS - 1) / ROWS * chains : 0;
    }

    __device__ void add_up() {
        unsigned mine = 0;
        for (unsigned i = 0; i < run; i++) mine += of_set(threadIdx.x * run + i);
        firsts[threadIdx.x + 1] = mine;
        __syncthreads();
        if (threadIdx.x < 32) {
            unsigned* const part = firsts + 1 + threadIdx.x * PART;
            unsigned ends[PART], sum = 0;
#pragma unroll
            for (int i = 0; i < PART; i++) ends[i] = sum += part[i];
            const unsigned before = sum_so_far(sum) - sum;
#pragma unroll
            for (int i = 0; i < PART; i++) part[i] = before + ends[i];
            if (threadIdx.x == 0) firsts[0] = 0;
        }
        __syncthreads();
    }

    __device__ unsigned count() const { return firsts[THREADS]; }

    // The set of a ticket, and that set's first ticket. All threads of a warp.
    __device__ unsigned find(unsigned ticket, unsigned& first) const {
        const int lane = threadIdx.x % 32;
        int part = PART * (31 - __clz(__ballot_sync(~0u, firsts[lane * PART] <= ticket)));
        part += 31 - __clz(__ballot_sync(~0u, lane < PART && firsts[part + lane] <= ticket));
        unsigned set = part * run;
        first = firsts[part];
        if (run == 1) return set;
        while (true) {
            unsigned mine = of_set(set + lane), end = first + sum_so_far(mine);
            unsigned beyond = __ballot_sync(~0u, end > ticket);
            int at = beyond ? __ffs(beyond) - 1 : 31;
            first = __shfl_sync(~0u, beyond ? end - mine : end, at);
            if (beyond) return set + at;
            set += 32;
        }
    }
};

template <class Parameters> __device__ void move_rows(const Parameters& p) {
    __shared__ unsigned firsts[THREADS + 1], next[2];
    __shared__ bool last;
    unsigned* const read = p.counters + 2;  // which tickets' tiles have been read
    Tickets<Parameters> tickets(p, firsts);
    if (threadIdx.x == 0) next[0] = atomicAdd(p.counters, 1);
    tickets.add_up();

    for (int turn = 0;; turn ^= 1) {
        const unsigned ticket = next[turn];
        if (ticket >= tickets.count()) break;
        unsigned first;
        const unsigned number = tickets.find(ticket, first);
        const unsigned tile = (ticket - first) / tickets.chains, chain = (ticket - first) % tickets.chains;
        const Set set = p.set(number);
        const auto rows = p.rows(number, chain / 2 / PIECES * p.G + number % p.G, chain % 2);

        // This thread's chunk of rows `row`, `row` + AT_ONCE, ... of the set, which go to `to` and so on.
        const int row = tile * ROWS + threadIdx.x / LANES, to = set.to + row;
        const int rest = threadIdx.x % LANES < CHUNKS ? set.count - row : 0;
        const int offset = (chain / 2 % PIECES * CHUNKS + threadIdx.x % LANES) * CHUNK_BYTES;
        int from[ITEMS], page[ITEMS];
        const int* column = set.columns + row * set.stride;
#pragma unroll
        for (int i = 0; i < ITEMS; i++, column += AT_ONCE * set.stride) from[i] = i * AT_ONCE < rest ? *column : -1;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {  // without branches, so that all pages are looked up at once
            const int place = to + i * AT_ONCE;
            const bool moves = place >= set.first && from[i] > place && from[i] < set.length;
            const int found = rows.page(moves ? from[i] : 0);
            page[i] = moves ? found : -1;
        }
        Chunk held[ITEMS];
        unsigned moves = 0;  // a bit an item
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (page[i] >= 0) {
                moves |= 1u << i;
                held[i] = *(const Chunk*)(rows.at(page[i], from[i]) + offset);
            }
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {  // from here on, where it goes
            page[i] = rows.page(moves >> i & 1 ? to + i * AT_ONCE : 0);
            if (page[i] < 0) moves &= ~(1u << i);
        }
        unsigned reader = 0;
        if (threadIdx.x < 32) reader = last_tile_before(set.columns, set.stride, tile, set.to + tile * ROWS);

        const bool write = __syncthreads_or(moves);  // the tile has been read
        if (threadIdx.x == 0) {
            release(read + ticket);
            next[turn ^ 1] = atomicAdd(p.counters, 1);
        }
        // What the tile overwrites are as many rows as it has, so two tiles at most read them.
        if (write && threadIdx.x < 2 && reader + threadIdx.x < tile)
            while (!acquire(read + first + (reader + threadIdx.x) * tickets.chains + chain)) {}
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (moves >> i & 1) *(Chunk*)(rows.at(page[i], to + i * AT_ONCE) + offset) = held[i];
    }

    // The last block puts the counters back.
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(p.counters + 1, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    for (unsigned i = threadIdx.x; i < 2 + tickets.count(); i += THREADS) p.counters[i] = 0;
}
