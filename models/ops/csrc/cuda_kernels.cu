// Multi-scale deformable attention on CUDA devices: forward, backward, and what the backward
// leaves.
//
// Deformable DETR (Zhu et al., ICLR 2021), equation 3; models/ops/reference.py says what is
// computed. The public kernel gives each channel a thread, which works out its samples' places
// again and loads 4 bytes; here a sample's place is worked out once, 8 or 16 bytes are loaded, and
// the softmax and the sum of reference point and offset happen in registers. The gradient of the
// values is added in float32 whatever their type, four neighbours by one instruction from sm_90 on.
//
// nvcc compiles this file at build time where it is, NVRTC at first use where it is not; the names
// at the end say which kernels. No header of CUDA is needed.
#include "cuda_arguments.cuh"
#include "cuda_numbers.cuh"
#include "cuda_sampling.cuh"
#include "cuda_forward.cuh"
#include "cuda_backward.cuh"
#include "cuda_whole.cuh"
#include "cuda_finish.cuh"

#define QUERYPATCH_SAMPLING(SHAPE) \
  __global__ void __launch_bounds__(SHAPE::threads, SHAPE::resident_threads / SHAPE::threads)
#define QUERYPATCH_PLAIN __global__ void __launch_bounds__(max_threads_per_block, 4)

// One shape's kernels: QUERYPATCH_FIXED(value, point, weight, channels, levels, points).
#define QUERYPATCH_FIXED(V, P, W, C, L, N)                                                        \
  using Forward_##V##_##P##_##W##_##C##_##L##_##N =                                               \
      Fixed<V, P, W, C, L, N, lanes_per_head(C, sizeof(V::Stored))>;                              \
  using Backward_##V##_##P##_##W##_##C##_##L##_##N =                                              \
      Fixed<V, P, W, C, L, N, lanes_per_head_backward(C, sizeof(V::Stored))>;                     \
  QUERYPATCH_SAMPLES(V##_##P##_##W##_##C##_##L##_##N, Forward_##V##_##P##_##W##_##C##_##L##_##N,  \
                     Backward_##V##_##P##_##W##_##C##_##L##_##N)

#define QUERYPATCH_SAMPLES(NAME, FORWARD, BACKWARD)                                               \
  extern "C" QUERYPATCH_SAMPLING(FORWARD) forward_##NAME(const Arguments a) {                     \
    forward<FORWARD>(a);                                                                          \
  }                                                                                               \
  extern "C" QUERYPATCH_SAMPLING(BACKWARD) backward_##NAME(const Arguments a) {                   \
    backward<BACKWARD, false>(a);                                                                 \
  }

// The kernels of a type of values that take any shape, and those that finish a backward.
#define QUERYPATCH_ANY(V)                                                                         \
  QUERYPATCH_SAMPLES(V, Any<V>, Any<V>)                                                           \
  extern "C" QUERYPATCH_SAMPLING(Any<V>) backward_whole_##V(const Arguments a) {                  \
    backward<Any<V>, true>(a);                                                                    \
  }                                                                                               \
  extern "C" QUERYPATCH_PLAIN bounds_##V(const Arguments a) { find_bounds<V>(a); }                \
  extern "C" QUERYPATCH_PLAIN rounded_##V(const Arguments a) { round_sums<V>(a); }                \
  extern "C" QUERYPATCH_PLAIN rounded_whole_##V(const Arguments a) { round_whole_sums<V>(a); }    \
  extern "C" QUERYPATCH_PLAIN references_##V(const Arguments a) { sum_references<V>(a); }

// Four levels and four points are what every published detector has; the second line of a type is
// the classic operator's, whose locations are float32.
#define QUERYPATCH_STANDARD(V, P, W) \
  QUERYPATCH_FIXED(V, P, W, 16, 4, 4) \
  QUERYPATCH_FIXED(V, P, W, 32, 4, 4) \
  QUERYPATCH_FIXED(V, P, W, 64, 4, 4)

namespace querypatch {
namespace cuda {

#ifdef QUERYPATCH_ONLY  // NVRTC names what it compiles
QUERYPATCH_ONLY
#else
QUERYPATCH_STANDARD(f32, f32, f32)
QUERYPATCH_STANDARD(bf16, bf16, bf16)
QUERYPATCH_STANDARD(bf16, f32, bf16)
QUERYPATCH_STANDARD(f16, f16, f16)
QUERYPATCH_STANDARD(f16, f32, f16)
QUERYPATCH_ANY(f32)
QUERYPATCH_ANY(bf16)
QUERYPATCH_ANY(f16)
QUERYPATCH_ANY(f64)
#endif

}  // namespace cuda
}  // namespace querypatch
