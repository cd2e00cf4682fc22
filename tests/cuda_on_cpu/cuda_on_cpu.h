// Runs a CUDA C kernel on the CPU, slowly: blocks one after the other, the threads of a block as coroutines in one thread.
// Whoever waits for others lets them go on; a block in which nobody goes on any more is reported.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
    unsigned x;
};
struct int2 {
    int x, y;
};
struct uint2 {
    unsigned x, y;
};
struct int4 {
    int x, y, z, w;
};
struct float2 {
    float x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};

static Index threadIdx, blockIdx, blockDim, gridDim;
alignas(1024) char raw[232448];  // shared memory whose size the launch gives

// --- coroutines ----------------------------------------------------------------------------------------------------

struct Counter {  // of arrivals; `size` of them complete a turn
    unsigned long long arrived = 0;
};

struct Warp {
    unsigned long long slots[2][32], turn[32];
    Counter counter;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
};

static ucontext_t scheduler;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static Counter barriers[16];
static unsigned long long progress;
static std::function<void()> body;

template <class Ready>
void wait_until(Ready ready) {
    unsigned me = threadIdx.x;
    while (!ready()) {
        swapcontext(&threads[me].context, &scheduler);
        threadIdx.x = me;
    }
    ++progress;
}

static void arrive_at(Counter& counter) { ++counter.arrived; }

static void sync_at(Counter& counter, unsigned long long size) {
    unsigned long long turn = counter.arrived++ / size + 1;
    wait_until([&] { return counter.arrived >= turn * size; });
}

static void run_thread() {
    body();
    threads[threadIdx.x].done = true;
}

static void run_grid(unsigned blocks, unsigned count, std::function<void()> kernel) {
    constexpr size_t STACK = 1 << 16;
    body = kernel, gridDim.x = blocks, blockDim.x = count;
    if (threads.size() < count) threads.resize(count);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        memset(raw, 0xFF, sizeof raw);  // NaN, and no barrier
        warps.assign((count + 31) / 32, Warp{});
        for (Counter& barrier : barriers) barrier = {};
        for (unsigned i = 0; i < count; ++i) {
            Thread& x = threads[i];
            if (!x.stack) x.stack.reset(new char[STACK]);
            getcontext(&x.context);
            x.context.uc_stack.ss_sp = x.stack.get(), x.context.uc_stack.ss_size = STACK, x.context.uc_link = &scheduler;
            x.done = false;
            makecontext(&x.context, run_thread, 0);
        }
        unsigned left = count, idle = 0;
        while (left) {
            unsigned long long before = progress;
            unsigned still = 0;
            for (unsigned i = 0; i < count; ++i)
                if (!threads[i].done) {
                    threadIdx.x = i;
                    swapcontext(&scheduler, &threads[i].context);
                    still += !threads[i].done;
                }
            idle = progress == before && still == left ? idle + 1 : 0;
            left = still;
            if (idle > 2) fprintf(stderr, "block %u of %u: %u threads wait for ever\n", blockIdx.x, blocks, left), abort();
        }
    }
}

template <class Params>
static void call(void (*kernel)(Params), const void* p) {
    kernel(*(const Params*)p);
}

#define RUN(kernel)                                                                  \
    extern "C" void run_##kernel(unsigned blocks, unsigned threads, const void* p) { \
        run_grid(blocks, threads, [=] { call(kernel, p); });                         \
    }

// --- what all threads of a block or warp do together ------------------------------------------------------------------

static void __syncthreads() { sync_at(barriers[0], blockDim.x); }

// What each lane of the warp gave.
static const unsigned long long* exchange(unsigned long long mine) {
    Warp& warp = warps[threadIdx.x / 32];
    unsigned lane = threadIdx.x % 32;
    auto slots = warp.slots[warp.turn[lane]++ % 2];
    slots[lane] = mine;
    sync_at(warp.counter, 32);
    return slots;
}

template <class T>
static unsigned long long as_bits(T x) {
    unsigned long long bits = 0;
    memcpy(&bits, &x, sizeof x);
    return bits;
}

template <class T>
static T from_bits(unsigned long long bits) {
    T x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void __syncwarp() { exchange(0); }

static bool __syncthreads_or(bool mine) {
    static bool any;
    __syncthreads();
    any |= mine;
    __syncthreads();
    bool found = any;
    __syncthreads();
    any = false;
    return found;
}

static unsigned __ballot_sync(unsigned, bool mine) {
    auto slots = exchange(mine);
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= unsigned(slots[i]) << i;
    return all;
}

static bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
static bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, !x) == 0; }

template <class T>
static T __shfl_sync(unsigned, T x, int lane) {
    return from_bits<T>(exchange(as_bits(x))[lane % 32]);
}

template <class T>
static T __shfl_xor_sync(unsigned, T x, int other) {
    return from_bits<T>(exchange(as_bits(x))[threadIdx.x % 32 ^ other]);
}

template <class T>
static T __shfl_up_sync(unsigned, T x, unsigned by) {
    unsigned lane = threadIdx.x % 32;
    return from_bits<T>(exchange(as_bits(x))[lane >= by ? lane - by : lane]);
}

template <class T, class Join>
static T reduce(T x, Join join) {
    auto slots = exchange(as_bits(x));
    T all = from_bits<T>(slots[0]);
    for (int i = 1; i < 32; ++i) all = join(all, from_bits<T>(slots[i]));
    return all;
}

template <class T>
static T __reduce_add_sync(unsigned, T x) {
    return reduce(x, [](T a, T b) { return a + b; });
}
template <class T>
static T __reduce_or_sync(unsigned, T x) {
    return reduce(x, [](T a, T b) { return a | b; });
}
template <class T>
static T __reduce_max_sync(unsigned, T x) {
    return reduce(x, [](T a, T b) { return a > b ? a : b; });
}

// --- what a thread does alone ----------------------------------------------------------------------------------------

template <class A, class B>
static auto min(A a, B b) {
    using C = std::common_type_t<A, B>;
    return C(a) < C(b) ? C(a) : C(b);
}
template <class A, class B>
static auto max(A a, B b) {
    using C = std::common_type_t<A, B>;
    return C(a) < C(b) ? C(b) : C(a);
}
template <class T, class U>
static T atomicAdd(T* at, U x) {
    T before = *at;
    *at += x;
    return before;
}
template <class T, class U>
static T atomicExch(T* at, U x) {
    T before = *at;
    *at = x;
    return before;
}
template <class T>
static T __ldg(const T* at) {
    return *at;
}
template <class T>
static T __ldcg(const T* at) {
    return *at;
}
template <class T>
static void __stcs(T* at, T x) {
    *at = x;
}
static void __threadfence() {}
static int __popc(unsigned x) { return __builtin_popcount(x); }
static int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
static int __ffs(unsigned x) { return __builtin_ffs(x); }
static unsigned __float_as_uint(float x) { return as_bits(x); }
static float __int_as_float(unsigned x) { return from_bits<float>(x); }
static float __frcp_rn(float x) { return 1 / x; }
static float2 make_float2(float x, float y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
