// Gradients of the values, the points and the weights from the gradient of the output.
//
// With g the gradient of a head's output and v its four corner values, all that is needed of a
// sample are the four products g.v: its weight's gradient is their bilinear mean, its location's
// gradients are their differences, and each corner of the values receives its weight times g.
#pragma once

#include "cuda_forward.cuh"
#include "cuda_whole.cuh"

namespace querypatch {
namespace cuda {

// The four products of a sample, each summed over the lanes of the head, onto the board. Lanes
// halve the numbers they carry while there is more than one: three shuffles where there were eight.
template <class Shape>
__device__ __forceinline__ void write_dots(const Place& at,
                                           const typename Shape::Real (&dot)[4],
                                           Corners<typename Shape::Real>& to) {
  using Real = typename Shape::Real;
  if constexpr (Shape::lanes == 1) {
    to = {{dot[0], dot[1], dot[2], dot[3]}};
  } else {
    const bool odd = at.lane & 1, second = at.lane & 2;
    Real top = odd ? dot[1] : dot[0], bottom = odd ? dot[3] : dot[2];
    top += __shfl_xor_sync(all_lanes, odd ? dot[0] : dot[1], 1);
    bottom += __shfl_xor_sync(all_lanes, odd ? dot[2] : dot[3], 1);
    if constexpr (Shape::lanes == 2) {
      to.corner[at.lane] = top;
      to.corner[at.lane + 2] = bottom;
    } else {
      Real mine = second ? bottom : top;
      mine += __shfl_xor_sync(all_lanes, second ? top : bottom, 2);
#pragma unroll
      for (int other = 4; other < Shape::lanes; other *= 2)
        mine += __shfl_xor_sync(all_lanes, mine, other);
      if (at.lane < 4) to.corner[at.lane] = mine;
    }
  }
}

// What a sample's owner makes of its products: gradients of the attention weight and of the pixel.
template <class Real>
struct Slopes {
  Real weight;
  Real x;
  Real y;
};

template <class Real>
__device__ __forceinline__ Slopes<Real> slopes(const Sample<Real>& sample,
                                               const Corners<Real>& dots) {
  Real d[4];
#pragma unroll
  for (int c = 0; c < 4; c++) d[c] = sample.inside >> c & 1u ? dots.corner[c] : Real(0);
  const Real top = fused(sample.right, d[1] - d[0], d[0]);
  const Real bottom = fused(sample.right, d[3] - d[2], d[2]);
  const Real across = fused(sample.down, (d[3] - d[2]) - (d[1] - d[0]), d[1] - d[0]);
  return {fused(sample.down, bottom - top, top), sample.weight * across,
          sample.weight * (bottom - top)};
}

// Everything that one lane keeps through a backward.
template <class Shape>
struct Head {
  Place at;
  const char* tokens;                     // of the value, channel 0 of the head
  long long first_sum;                    // the same place in the values' gradient
  const typename Shape::Value::Stored* g;  // channel 0 of the head's output gradient
  int bytes_per_token;
  int channels_per_token;
  bool scatters;
  WholeScale by;
};

template <class Shape, bool whole>
__device__ __forceinline__ Head<Shape> head_of(const Arguments& a) {
  using Stored = typename Shape::Value::Stored;
  Head<Shape> head;
  head.at = place<Shape>(a);
  head.tokens = first_token<Shape>(a, head.at, 0);
  head.first_sum = (head.at.image * a.tokens * a.heads + head.at.head) * a.channels;
  head.g = static_cast<const Stored*>(a.grad_output) + head.at.pair * a.channels;
  head.channels_per_token = a.heads * a.channels;
  head.bytes_per_token = head.channels_per_token * static_cast<int>(sizeof(Stored));
  head.scatters = a.grad_value != nullptr;
  head.by = {1.0, 1.0};
  if constexpr (whole) {
    head.by = whole_scale(a, head.at.image);
    head.scatters = head.scatters && head.by.finite();
  }
  return head;
}

// Adds `weight` times the lane's channels of g, from `channel` on, to a cell of the gradient.
template <class Shape, bool whole>
__device__ __forceinline__ void scatter(const Arguments& a, const Head<Shape>& head,
                                        long long token, int channel,
                                        typename Shape::Real weight,
                                        const typename Shape::Real (&g)[Shape::vector]) {
  using Real = typename Shape::Real;
  const long long index = head.first_sum + token * head.channels_per_token + channel;
  if constexpr (whole) {
    add_whole(static_cast<unsigned long long*>(a.grad_value), index, weight * g[0], head.by);
  } else if constexpr (Shape::vector == 1) {
    atomicAdd(static_cast<Real*>(a.grad_value) + index, weight * g[0]);
  } else {
#pragma unroll
    for (int c = 0; c < Shape::vector; c += 4)
      add_four(static_cast<float*>(a.grad_value) + index + c, weight * g[c], weight * g[c + 1],
               weight * g[c + 2], weight * g[c + 3]);
  }
}

// One addition for all corners of a level's samples that are the same cell: the first of them gets
// the sum of their weights, the others get none. Adding to memory is what a backward takes its time
// for; corners outside the level weigh nothing and are no cell's.
template <class Shape>
__device__ __forceinline__ void merge_corners(const Place& at, Board<Shape, true>& board) {
  using Real = typename Shape::Real;
  const int end = min((at.lane + 1) * Shape::own, Shape::board);
#pragma unroll 1
  for (int spot = at.lane * Shape::own; spot < end; spot++) {
    const int level = spot / Shape::points * Shape::points;
    const Tokens mine = board.tokens[at.slot][spot];
    const Corners<Real> given = board.weights[at.slot][spot];
    Corners<Real> merged = given;
    bool repeats[4] = {};
#pragma unroll
    for (int p = 0; p < Shape::points; p++) {
      if (level + p == spot) continue;
      const Tokens other = board.tokens[at.slot][level + p];
      const Corners<Real> weights = board.weights[at.slot][level + p];
#pragma unroll
      for (int d = 0; d < 4; d++) {
        const int token = weights.corner[d] != Real(0) ? other.corner[d] : -1;
#pragma unroll
        for (int c = 0; c < 4; c++) {
          if (mine.corner[c] != token) continue;
          merged.corner[c] += weights.corner[d];
          repeats[c] = repeats[c] || level + p < spot;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 4; c++)
      if (repeats[c] || given.corner[c] == Real(0)) merged.corner[c] = 0;
    board.dots[at.slot][spot] = merged;  // free as yet
  }
  __syncwarp();  // all have read
  for (int spot = at.lane * Shape::own; spot < end; spot++)
    board.weights[at.slot][spot] = board.dots[at.slot][spot];
  __syncwarp();
}

// The lane's part of a sample's four products, over its channels from `channel` on; scatters too.
template <class Shape, bool whole>
__device__ __forceinline__ void visit(const Arguments& a, const Head<Shape>& head, int channel,
                                      bool scatters, const Tokens& where,
                                      const Corners<typename Shape::Real>& weights,
                                      const typename Shape::Real (&g)[Shape::vector],
                                      typename Shape::Real (&dot)[4]) {
  using Value = typename Shape::Value;
  using Stored = typename Value::Stored;
#pragma unroll
  for (int corner = 0; corner < 4; corner++) {
    const long long token = where.corner[corner];
    const char* from = head.tokens + token * head.bytes_per_token;
    typename Shape::Real cell[Shape::vector];
    read_many<Value, Shape::vector>(reinterpret_cast<const Stored*>(from) + channel, cell);
#pragma unroll
    for (int c = 0; c < Shape::vector; c++) dot[corner] = fused(g[c], cell[c], dot[corner]);
    if (scatters && weights.corner[corner] != typename Shape::Real(0))
      scatter<Shape, whole>(a, head, token, channel, weights.corner[corner], g);
  }
}

// The products of one sample over all channels of the head, onto the board.
template <class Shape, bool whole>
__device__ __forceinline__ void visit_all(const Arguments& a, const Head<Shape>& head,
                                          bool scatters,
                                          const typename Shape::Real (&g)[Shape::vector], int spot,
                                          Board<Shape, true>& board) {
  const int slot = head.at.slot;
  const Tokens where = board.tokens[slot][spot];
  const Corners<typename Shape::Real> weights = board.weights[slot][spot];
  typename Shape::Real dot[4] = {};
  if constexpr (Shape::any) {
    for (int channel = head.at.lane; channel < a.channels; channel += Shape::lanes) {
      const typename Shape::Real one[1] = {Shape::Value::read(__ldg(head.g + channel))};
      visit<Shape, whole>(a, head, channel, scatters, where, weights, one, dot);
    }
  } else {
    const int channel = head.at.lane * Shape::vector;
    visit<Shape, whole>(a, head, channel, scatters, where, weights, g, dot);
  }
  write_dots<Shape>(head.at, dot, board.dots[slot][spot]);
}

// The gradients of the lane's own samples of a board, `each` numbers a sample.
template <class Shape, class Number, int each>
__device__ __forceinline__ void write_own(void* tensor, const Place& at, int samples,
                                          const typename Shape::Real* from) {
  constexpr int count = Shape::own * each;
  const int sample = at.lane * Shape::own;
  auto* to = static_cast<typename Number::Stored*>(tensor) + (at.pair * samples + sample) * each;
  if constexpr (Shape::board % Shape::own == 0) {
    if (sample < samples) write_many<Number, count>(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < count; i++)
      if (sample + i / each < samples) to[i] = Number::write(from[i]);
  }
}

template <class Shape>
__device__ __forceinline__ void write_gradients(
    const Arguments& a, const Place& at, int first,
    const typename Shape::Real (&points)[2 * Shape::own],
    const typename Shape::Real (&locations)[2 * Shape::own],
    const typename Shape::Real (&weights)[Shape::own]) {
  using Real = typename Shape::Real;
  const int samples = samples_of<Shape>(a);
  if (!at.active) return;
  if constexpr (Shape::any) {
    if (first + at.lane >= samples) return;
    const long long index = at.pair * samples + first + at.lane;
    if (a.grad_points) {
      write_tagged(a.grad_points, 2 * index, a.point_tag, points[0]);
      write_tagged(a.grad_points, 2 * index + 1, a.point_tag, points[1]);
    }
    if (a.grad_locations) {
      static_cast<Real*>(a.grad_locations)[2 * index] = locations[0];
      static_cast<Real*>(a.grad_locations)[2 * index + 1] = locations[1];
    }
    if (a.grad_weights) write_tagged(a.grad_weights, index, a.weight_tag, weights[0]);
  } else {
    if (a.grad_points)
      write_own<Shape, typename Shape::Point, 2>(a.grad_points, at, samples, points);
    if (a.grad_locations) write_own<Shape, f32, 2>(a.grad_locations, at, samples, locations);
    if (a.grad_weights)
      write_own<Shape, typename Shape::Weight, 1>(a.grad_weights, at, samples, weights);
  }
}

// From the slopes of the lane's own samples; `mean` is what the softmax takes off.
template <class Shape>
__device__ __forceinline__ void finish_board(
    const Arguments& a, const Place& at, int first, bool softmax,
    const View<typename Shape::Real> (&views)[Shape::views],
    const Sample<typename Shape::Real> (&own)[Shape::own],
    const Slopes<typename Shape::Real> (&slope)[Shape::own], typename Shape::Real mean) {
  using Real = typename Shape::Real;
  Real points[2 * Shape::own], locations[2 * Shape::own], weights[Shape::own];
#pragma unroll
  for (int i = 0; i < Shape::own; i++) {
    const View<Real>& view = views[Shape::views == 1 ? 0 : i];
    points[2 * i] = slope[i].x * view.scale_x;
    points[2 * i + 1] = slope[i].y * view.scale_y;
    locations[2 * i] = slope[i].x * view.columns;
    locations[2 * i + 1] = slope[i].y * view.rows;
    weights[i] = softmax ? own[i].weight * (slope[i].weight - mean) : slope[i].weight;
  }
  write_gradients<Shape>(a, at, first, points, locations, weights);
}

template <class Shape, bool whole>
__device__ __forceinline__ void backward(const Arguments& a) {
  using Real = typename Shape::Real;
  __shared__ Board<Shape, true> board;
  const Head<Shape> head = head_of<Shape, whole>(a);
  const Place& at = head.at;
  const Softmax<Real> attention = softmax<Shape>(a, at);
  const int samples = samples_of<Shape>(a);
  Real g[Shape::vector] = {};
  if constexpr (!Shape::any)
    read_many<typename Shape::Value, Shape::vector>(head.g + at.lane * Shape::vector, g);
  View<Real> views[Shape::views];
  Sample<Real> own[Shape::own];
  Slopes<Real> slope[Shape::own];
  Real mean = 0;  // of the weights' gradients over the head, weighted
  // Where a head has more samples than a board, the mean is found first, in a turn of its own.
  const bool two_turns = Shape::any && samples > Shape::board && attention.wanted;
  for (int turn = two_turns ? 0 : 1; turn < 2; turn++) {
    const bool finds_mean = attention.wanted && (turn == 0 || !two_turns);
    for (int first = 0; first < samples; first += Shape::board) {
      const int count = write_board<Shape, true>(a, at, first, attention, board, views, own);
      if constexpr (Shape::merges)
        if (head.scatters) merge_corners(at, board);
#pragma unroll(Shape::unroll)
      for (int i = 0; i < (Shape::any ? count : Shape::board); i++)
        visit_all<Shape, whole>(a, head, head.scatters && turn == 1, g, i, board);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < Shape::own; i++) {
        const int spot = min(at.lane * Shape::own + i, Shape::board - 1);
        slope[i] = slopes(own[i], board.dots[at.slot][spot]);
        if (finds_mean) mean = fused(own[i].weight, slope[i].weight, mean);
      }
      if (finds_mean && first + Shape::board >= samples) mean = sum_over_head<Shape>(mean);
      if (turn == 1) finish_board<Shape>(a, at, first, attention.wanted, views, own, slope, mean);
    }
  }
}

}  // namespace cuda
}  // namespace querypatch
