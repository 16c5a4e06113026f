// The kernels for every machine: 16-byte vectors (SSE2, NEON).
#include "cpu.h"

#define QUERYPATCH_VECTOR_BYTES 16

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

const CpuKernels& cpu_kernels_baseline() {
  static const CpuKernels kernels = {"baseline", forward, backward};
  return kernels;
}

}  // namespace querypatch
