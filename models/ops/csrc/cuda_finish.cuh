// What is left after a backward: sums rounded to the values' type, and the references' gradient.
#pragma once

#include "cuda_sampling.cuh"

namespace querypatch {
namespace cuda {

// The gradient of the values in their own type, from its float32 sums; four numbers a thread.
template <class Value>
__device__ __forceinline__ void round_sums(const Arguments& a) {
  using Real = typename Value::Real;
  const long long first =
      (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  const auto* sums = static_cast<const Real*>(a.grad_value);
  auto* grad = static_cast<typename Value::Stored*>(a.output);
  if constexpr (sizeof(typename Value::Stored) == 2) {
    if (first + 4 <= a.elements) {
      Real four[4];
      read_many<f32, 4>(sums + first, four);
      write_many<Value, 4>(grad + first, four);
      return;
    }
  }
  for (long long i = first; i < first + 4 && i < a.elements; i++) grad[i] = Value::write(sums[i]);
}

// The references' gradient: that of the locations, summed over heads and points in one order. A box
// moves its points by their offsets, of which `points` reach from the centre to the edge.
template <class Value>
__device__ __forceinline__ void sum_references(const Arguments& a) {
  using Real = typename Value::Real;
  const long long image = static_cast<long long>(a.first_image) + blockIdx.y;
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (at >= a.queries * a.levels) return;
  const int query = at / a.levels, level = at - query * a.levels;
  Real x_sum = 0, y_sum = 0, width_sum = 0, height_sum = 0;
#pragma unroll 1
  for (int head = 0; head < a.heads; head++) {
    const long long pair = (image * a.queries + query) * a.heads + head;
    const long long first = (pair * a.levels + level) * a.points_per_level;
#pragma unroll 1
    for (long long i = 2 * first; i < 2 * (first + a.points_per_level); i += 2) {
      const Real x = static_cast<const Real*>(a.grad_locations)[i];
      const Real y = static_cast<const Real*>(a.grad_locations)[i + 1];
      x_sum += x;
      y_sum += y;
      if (a.coordinates == 2) continue;
      // A sample that lies nowhere has no slope, whatever its offset: 0 times NaN would be NaN.
      const Real right = read_tagged<Real>(a.points, i, a.point_tag);
      const Real down = read_tagged<Real>(a.points, i + 1, a.point_tag);
      if (x != 0) width_sum = fused(x, right, width_sum);
      if (y != 0) height_sum = fused(y, down, height_sum);
    }
  }
  const Real reach = static_cast<Real>(0.5) / static_cast<Real>(a.points_per_level);
  Real* grad = static_cast<Real*>(a.grad_references) +
               (image * a.queries * a.levels + at) * a.coordinates;
  grad[0] = x_sum;
  grad[1] = y_sum;
  if (a.coordinates == 2) return;
  grad[2] = width_sum * reach;
  grad[3] = height_sum * reach;
}

}  // namespace cuda
}  // namespace querypatch
