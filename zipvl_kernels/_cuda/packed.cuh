// Sequences that lie one after the other ("packed"): sequence b is rows [cu_seqlens[b], cu_seqlens[b + 1]) of T.
//
// Kernels are compiled for them with PACKED = 1. Without it a span is all rows from 0 on, known to the compiler, so that
// code for both costs nothing. What cu_seqlens holds is not trusted: no span leaves the T rows.

#ifndef PACKED
#define PACKED 0
#endif

struct Packing {
    const int* cu_seqlens;  // [B + 1]
    int B, T;
    int most;  // rows of a sequence at most
};

struct Span {
    int first, rows;
};

__device__ __forceinline__ int first_row(const Packing& x, int b) { return min(max(x.cu_seqlens[b], 0), x.T); }

__device__ __forceinline__ Span span_of(const Packing& x, int b) {
    if (!PACKED) return {0, x.most};
    int first = first_row(x, b);
    return {first, min(max(first_row(x, b + 1) - first, 0), x.most)};
}

// Work shared out without adding up lengths: a place for every so many rows, and so many more for each sequence. All in
// all that is T / every + B * apart, and a sequence of n rows has n / every + apart of them at least. `apart` is not 0.
struct Places {
    int every, apart;
};

__device__ __forceinline__ int first_place(const Packing& x, const Places& places, int b) {
    return first_row(x, b) / places.every + b * places.apart;
}

// The sequence that a place belongs to, by 32 lanes: the last one that begins there or before.
__device__ __forceinline__ int sequence_at(const Packing& x, const Places& places, int place) {
    int low = 0, high = x.B - 1;
    while (low < high) {
        int step = (high - low + 31) / 32, ahead = low + step * (threadIdx.x % 32 + 1);
        bool before = ahead <= high && first_place(x, places, ahead) <= place;
        low += step * __popc(__ballot_sync(~0u, before));
        high = min(low + step - 1, high);
    }
    return low;
}
