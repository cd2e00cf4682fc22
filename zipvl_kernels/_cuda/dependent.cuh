// Programmatic dependent launch, on Hopper and later: a kernel's blocks may start while the kernel before it still runs,
// once all of that one's blocks have said so or ended. Nothing is read or written by it before `after_previous_kernel`;
// every block calls that before `next_kernel_may_start`, so what starts can rely on the kernel before the previous one.

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void after_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void next_kernel_may_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
__device__ __forceinline__ void after_previous_kernel() {}
__device__ __forceinline__ void next_kernel_may_start() {}
#endif
