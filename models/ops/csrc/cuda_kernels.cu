// Multi-scale deformable attention on CUDA devices: forward, backward, and what the backward leaves.
//
// Deformable DETR (Zhu et al., ICLR 2021), equation 3; models/ops/reference.py says what is computed.
// The public kernel gives each channel a thread, which works out its samples' places again and loads
// 4 bytes; here a sample's place is worked out once and 16 bytes are loaded, and the softmax and the
// sum of reference point and offset happen in registers. The gradient of the values is added in
// float32 whatever their type, four neighbours by one instruction from sm_90 on.
//
// nvcc compiles this file at build time where it is, NVRTC at first use where it is not; the names at
// the end say which kernels. No header of CUDA is needed.
#include "cuda_arguments.cuh"
#include "cuda_numbers.cuh"
#include "cuda_sampling.cuh"
#include "cuda_forward.cuh"
#include "cuda_backward.cuh"
#include "cuda_whole.cuh"
#include "cuda_finish.cuh"

// One shape's kernels: QUERYPATCH_FIXED(value, point, weight, channels, levels, points).
#define QUERYPATCH_FIXED(V, P, W, C, L, N)                                                      \
  extern "C" __global__ void __launch_bounds__(128)                                             \
      forward_##V##_##P##_##W##_##C##_##L##_##N(const querypatch::cuda::Arguments a) {          \
    using namespace querypatch::cuda;                                                           \
    forward<Fixed<V, P, W, C, L, N>>(a);                                                        \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(128)                                             \
      backward_##V##_##P##_##W##_##C##_##L##_##N(const querypatch::cuda::Arguments a) {         \
    using namespace querypatch::cuda;                                                           \
    backward<Fixed<V, P, W, C, L, N>, false>(a);                                                \
  }

// The kernels of a type of values that take any shape, and those that finish a backward.
#define QUERYPATCH_ANY(V)                                                                       \
  extern "C" __global__ void __launch_bounds__(128)                                             \
      forward_##V(const querypatch::cuda::Arguments a) {                                        \
    querypatch::cuda::forward<querypatch::cuda::Any<querypatch::cuda::V>>(a);                   \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(128)                                             \
      backward_##V(const querypatch::cuda::Arguments a) {                                       \
    querypatch::cuda::backward<querypatch::cuda::Any<querypatch::cuda::V>, false>(a);           \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(128)                                             \
      backward_whole_##V(const querypatch::cuda::Arguments a) {                                 \
    querypatch::cuda::backward<querypatch::cuda::Any<querypatch::cuda::V>, true>(a);            \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(128)                                             \
      bounds_##V(const querypatch::cuda::Arguments a) {                                         \
    querypatch::cuda::find_bounds<querypatch::cuda::V>(a);                                      \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(128)                                             \
      rounded_##V(const querypatch::cuda::Arguments a) {                                        \
    querypatch::cuda::round_sums<querypatch::cuda::V>(a);                                       \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(128)                                             \
      rounded_whole_##V(const querypatch::cuda::Arguments a) {                                  \
    querypatch::cuda::round_whole_sums<querypatch::cuda::V>(a);                                 \
  }                                                                                             \
  extern "C" __global__ void __launch_bounds__(128)                                             \
      references_##V(const querypatch::cuda::Arguments a) {                                     \
    querypatch::cuda::sum_references<querypatch::cuda::V>(a);                                   \
  }

// Four levels and four points are what every published detector has.
#define QUERYPATCH_STANDARD(V, P, W) \
  QUERYPATCH_FIXED(V, P, W, 16, 4, 4) \
  QUERYPATCH_FIXED(V, P, W, 32, 4, 4) \
  QUERYPATCH_FIXED(V, P, W, 64, 4, 4)

#ifdef QUERYPATCH_ONLY  // NVRTC names what it compiles
QUERYPATCH_ONLY
#else
QUERYPATCH_STANDARD(f32, f32, f32)
QUERYPATCH_STANDARD(bf16, bf16, bf16)
QUERYPATCH_STANDARD(bf16, f32, bf16)
QUERYPATCH_STANDARD(bf16, f32, f32)
QUERYPATCH_STANDARD(f16, f16, f16)
QUERYPATCH_STANDARD(f16, f32, f16)
QUERYPATCH_STANDARD(f16, f32, f32)
QUERYPATCH_ANY(f32)
QUERYPATCH_ANY(bf16)
QUERYPATCH_ANY(f16)
QUERYPATCH_ANY(f64)
#endif
