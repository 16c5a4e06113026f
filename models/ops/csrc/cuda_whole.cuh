// Sums of whole numbers: bit-equal from run to run, whatever order the device adds in.
//
// Contributions to the gradient of the values are scaled by a power of two and rounded to 64-bit
// whole numbers, whose addition does not depend on order as that of floating-point numbers does.
// The scale of an image leaves room for all of its samples in one cell. With 2^19 samples a head,
// what is lost is less than 2^-42 of the largest contribution that could be; float64 values keep
// 2^-83.
#pragma once

#include "cuda_sampling.cuh"

namespace querypatch {
namespace cuda {

// `scale` is 0 where a gradient is not finite, which no whole number can say.
struct WholeScale {
  double scale;
  double fine;  // float64 values keep what was rounded away in a second number, in finer units

  __device__ __forceinline__ bool finite() const { return scale != 0.0; }
};

__device__ __forceinline__ WholeScale whole_scale(const Arguments& a, long long image) {
  const double grad = __longlong_as_double(static_cast<long long>(a.bounds[2 * image]));
  const double weight = __longlong_as_double(static_cast<long long>(a.bounds[2 * image + 1]));
  const double bound = a.coordinates == 0 ? grad * weight : grad;
  if (!(bound <= 1.7e308)) return {0.0, 0.0};
  const double samples = static_cast<double>(a.queries) * a.levels * a.points_per_level;
  const int bits = ilogb(samples) + 1;
  const int exponent = bound > 0.0 ? 61 - bits - ilogb(bound) - 1 : 0;
  return {scalbn(1.0, min(exponent, 1000)), scalbn(1.0, 61 - bits)};
}

__device__ __forceinline__ void add_whole(unsigned long long* sums, long long index, float number,
                                          const WholeScale& by) {
  const long long whole = __double2ll_rn(static_cast<double>(number) * by.scale);
  atomicAdd(sums + index, static_cast<unsigned long long>(whole));
}

__device__ __forceinline__ void add_whole(unsigned long long* sums, long long index, double number,
                                          const WholeScale& by) {
  const double scaled = number * by.scale;
  const long long whole = __double2ll_rn(scaled);
  const long long rest = __double2ll_rn((scaled - static_cast<double>(whole)) * by.fine);
  atomicAdd(sums + 2 * index, static_cast<unsigned long long>(whole));
  atomicAdd(sums + 2 * index + 1, static_cast<unsigned long long>(rest));
}

// The larger of two magnitudes; a NaN is larger than every number.
__device__ __forceinline__ double larger_magnitude(double a, double b) {
  const long long first = __double_as_longlong(fabs(a)), second = __double_as_longlong(fabs(b));
  return __longlong_as_double(first > second ? first : second);
}

// The largest |grad_output| of each image, and of the classic operator's |weights|, which no
// softmax holds below 1; the largest bits are the largest numbers, and those of a NaN are larger
// still.
template <class Value>
__device__ __forceinline__ void find_bounds(const Arguments& a) {
  const long long image = static_cast<long long>(a.first_image) + blockIdx.y;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  const long long start = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const long long heads = static_cast<long long>(a.queries) * a.heads;
  const long long grads = heads * a.channels;
  const long long weights =
      a.coordinates == 0 ? heads * a.levels * a.points_per_level : 0;
  const auto* grad = static_cast<const typename Value::Stored*>(a.grad_output) + image * grads;
  double largest[2] = {0.0, 0.0};
  for (long long i = start; i < grads; i += step)
    largest[0] = larger_magnitude(largest[0], Value::read(__ldg(grad + i)));
  for (long long i = start; i < weights; i += step)
    largest[1] = larger_magnitude(
        largest[1], read_tagged<double>(a.weights, image * weights + i, a.weight_tag));
#pragma unroll
  for (int of = 0; of < 2; of++) {
    for (int other = 1; other < lanes_per_warp; other *= 2)
      largest[of] = larger_magnitude(largest[of], __shfl_xor_sync(all_lanes, largest[of], other));
    if (threadIdx.x % lanes_per_warp == 0)
      atomicMax(a.bounds + 2 * image + of,
                static_cast<unsigned long long>(__double_as_longlong(largest[of])));
  }
}

// The gradient of the values from whole numbers; `a.elements` of them an image.
template <class Value>
__device__ __forceinline__ void round_whole_sums(const Arguments& a) {
  const long long image = static_cast<long long>(a.first_image) + blockIdx.y;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  const WholeScale by = whole_scale(a, image);
  const double unit = by.finite() ? 1.0 / by.scale : __longlong_as_double(0x7ff8000000000000ll);
  constexpr int each = sizeof(typename Value::Real) == 8 ? 2 : 1;
  const auto* sums = static_cast<const long long*>(a.grad_value) + image * a.elements * each;
  auto* grad = static_cast<typename Value::Stored*>(a.output) + image * a.elements;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.elements;
       i += step) {
    double sum = static_cast<double>(sums[i * each]);
    if constexpr (each == 2) sum += static_cast<double>(sums[i * each + 1]) / by.fine;
    grad[i] = Value::write(static_cast<typename Value::Real>(sum * unit));
  }
}

}  // namespace cuda
}  // namespace querypatch
