// What setup.py puts into the library beside the code: the CUDA program and its compiled forms.
#pragma once

#include <cstdint>

#define QUERYPATCH_EXPORT extern "C" __attribute__((visibility("default")))

namespace querypatch {

// One architecture's machine code, from nvcc at build time.
struct Cubin {
  int32_t architecture;  // 90 is sm_90
  const void* data;      // aligned to 16 bytes
  uint64_t size;
};

// The text that nvcc compiled and that NVRTC compiles at first use elsewhere: cuda_kernels.cu, in
// which each `#include "cuda_*.cuh"` is replaced by that file, once. Empty in a build without CUDA.
extern const char* const cuda_program;

extern const Cubin* const cubins;
extern const int32_t num_cubins;

}  // namespace querypatch

// The same for Python's ctypes, with the number that models/ops/library.py expects.
QUERYPATCH_EXPORT int32_t querypatch_schema();
QUERYPATCH_EXPORT const char* querypatch_cpu_isa();
QUERYPATCH_EXPORT const char* querypatch_cuda_program();
QUERYPATCH_EXPORT int32_t querypatch_num_cubins();
QUERYPATCH_EXPORT int32_t querypatch_cubin_architecture(int32_t number);
