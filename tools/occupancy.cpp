// Asks NVIDIA's own cuda_occupancy.h, which needs no GPU. Each line of input: compute capability (major minor), shared
// memory of a multiprocessor and the most that a block may ask for, threads of a multiprocessor; then registers, static
// shared memory, threads and dynamic shared memory of a launch. Prints blocks that a multiprocessor holds at a time.
#include <cuda_occupancy.h>

#include <cstdio>

int main() {
  int major, minor, shared, shared_of_block, threads, registers, static_shared, block, dynamic_shared;
  while (std::scanf("%d %d %d %d %d %d %d %d %d", &major, &minor, &shared, &shared_of_block, &threads, &registers,
                    &static_shared, &block, &dynamic_shared) == 9) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = size_t(shared);
    device.sharedMemPerBlockOptin = size_t(shared_of_block);
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = size_t(static_shared);
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = size_t(shared_of_block);
    kernel.numBlockBarriers = 1;
    const cudaOccDeviceState state = {};
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, block, size_t(dynamic_shared));
    if (error != CUDA_OCC_SUCCESS) return 1;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
