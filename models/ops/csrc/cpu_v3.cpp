// The kernels for x86-64-v3: AVX2, FMA and F16C.
#include "cpu.h"

#define QUERYPATCH_VECTOR_BYTES 32

namespace querypatch {
namespace {
#include "cpu_vectors.inl"
#include "cpu_sums.inl"
#include "cpu_samples.inl"
#include "cpu_rows.inl"
#include "cpu_forward.inl"
#include "cpu_backward.inl"
#include "cpu_backward_tasks.inl"
}  // namespace

const CpuKernels& cpu_kernels_v3() {
  static const CpuKernels kernels = {"avx2", forward, backward};
  return kernels;
}

}  // namespace querypatch
