// Each query's weighted samples, head after head.
#pragma once

#include "cuda_sampling.cuh"

namespace querypatch {
namespace cuda {

// The first byte of the lane's channels in token 0 of its image.
template <class Shape>
__device__ __forceinline__ const char* first_token(const Arguments& a, const Place& at,
                                                   int channel) {
  const long long number =
      (at.image * a.tokens * a.heads + at.head) * a.channels + channel;
  return static_cast<const char*>(a.value) +
         number * static_cast<int>(sizeof(typename Shape::Value::Stored));
}

template <class Shape>
__device__ __forceinline__ void add_sample(const char* tokens, int bytes_per_token,
                                           const Tokens& where,
                                           const Corners<typename Shape::Real>& weights,
                                           typename Shape::Real (&sum)[Shape::vector]) {
  using Stored = typename Shape::Value::Stored;
#pragma unroll
  for (int corner = 0; corner < 4; corner++) {
    const char* from = tokens + static_cast<long long>(where.corner[corner]) * bytes_per_token;
    typename Shape::Real cell[Shape::vector];
    read_many<typename Shape::Value, Shape::vector>(reinterpret_cast<const Stored*>(from), cell);
#pragma unroll
    for (int c = 0; c < Shape::vector; c++)
      sum[c] = fused(weights.corner[corner], cell[c], sum[c]);
  }
}

template <class Shape>
__device__ __forceinline__ void forward(const Arguments& a) {
  using Real = typename Shape::Real;
  using Stored = typename Shape::Value::Stored;
  __shared__ Board<Shape, false> board;
  const Place at = place<Shape>(a);
  const Softmax<Real> attention = softmax<Shape>(a, at);
  const int samples = samples_of<Shape>(a);
  const int bytes_per_token = a.heads * a.channels * static_cast<int>(sizeof(Stored));
  Stored* output = static_cast<Stored*>(a.output) + at.pair * a.channels;
  View<Real> views[Shape::views];
  Sample<Real> own[Shape::own];
  // One turn where the channels are fixed: the lanes cover them.
  for (int turn = 0; turn < a.channels; turn += Shape::lanes * Shape::vector) {
    const int channel = turn + at.lane * Shape::vector;
    const bool there = channel < a.channels;
    const char* tokens = first_token<Shape>(a, at, there ? channel : 0);
    Real sum[Shape::vector] = {};
    for (int first = 0; first < samples; first += Shape::board) {
      const int count = write_board<Shape, false>(a, at, first, attention, board, views, own);
#pragma unroll(Shape::unroll)
      for (int i = 0; i < (Shape::any ? count : Shape::board); i++)
        add_sample<Shape>(tokens, bytes_per_token, board.tokens[at.slot][i],
                          board.weights[at.slot][i], sum);
    }
    if (at.active && there) write_many<typename Shape::Value, Shape::vector>(output + channel, sum);
    if constexpr (!Shape::any) break;
  }
}

}  // namespace cuda
}  // namespace querypatch
