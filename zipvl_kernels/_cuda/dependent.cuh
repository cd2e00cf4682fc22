// Programmatic dependent launch, on Hopper and later: a kernel's blocks may start while the kernel before it still runs,
// once all of that one's blocks have said so or ended. Before `after_previous_kernel` a block writes nothing, and reads
// only what is older than the kernel before its own: that has waited, too, since every block calls
// `after_previous_kernel` before `next_kernel_may_start`, and of blocks that end without either, one at least waits.

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void after_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void next_kernel_may_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
__device__ __forceinline__ void after_previous_kernel() {}
__device__ __forceinline__ void next_kernel_may_start() {}
#endif
