// A permutation of [0, n) that a key picks, as in the reference, number for number. It needs 32 bits: halves are below
// 2**16, and what is added to them is reduced first.

using u32 = unsigned int;

constexpr u32 ROUNDS = 6;  // even: the halves end where they began

struct Permutation {
    u32 key;
    u32 a, b, walks;  // [0, n) lies in [0, a * b), and so many more passes bring back what a pass took beyond n
    u32 n;
};

// `halves` of the reference, and what goes with it. Below 2**31 a root is exact but for its last digit.
__device__ __forceinline__ Permutation permutation_of(u32 key, u32 n) {
    const u32 x = n > 0 ? n - 1 : 0;
    u32 root = u32(sqrtf(float(x)));
    if (root * root > x) --root;
    if ((root + 1) * (root + 1) <= x) ++root;
    const u32 b = root + 1, a = (n + b - 1) / b, more = a * b - n;
    return {key, a, b, more < 16 ? more : 16, n};
}

__device__ __forceinline__ u32 mix(u32 x) {
    x ^= x >> 16;
    x *= 0x21F0AAAD;
    x ^= x >> 15;
    x *= 0x735A2D97;
    return x ^ x >> 15;
}

// (x + y) % m for x < m.
__device__ __forceinline__ u32 sum_modulo(u32 x, u32 y, u32 m) {
    x += y % m;
    return x < m ? x : x - m;
}

// One pass of a Feistel network on [0, a) x [0, b).
__device__ __forceinline__ u32 through(const Permutation& p, u32 x) {
    u32 left = x / p.b, right = x % p.b;
#pragma unroll
    for (u32 i = 0; i < ROUNDS; i += 2) {
        left = sum_modulo(left, mix(right ^ mix(p.key + i)), p.a);
        right = sum_modulo(right, mix(left ^ mix(p.key + i + 1)), p.b);
    }
    return left * p.b + right;
}

__device__ __forceinline__ u32 permuted(const Permutation& p, u32 x) {
    x = through(p, x);
    for (u32 walk = 0; walk < p.walks && x >= p.n; ++walk) x = through(p, x);
    return x;
}
