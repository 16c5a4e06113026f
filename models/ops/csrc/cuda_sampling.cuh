// Where the lanes of a warp stand, where their samples lie, and the softmax over a head's samples.
//
// A head of one query is worked on by a few neighbouring lanes. Each lane first works out its share
// of the samples, one lane a sample, and writes the four tokens and weights of each on a board in
// shared memory; then all lanes go over the board, each for its own channels. Nothing but the board
// passes between lanes except by shuffles, so warps never wait for each other.
#pragma once

#include "cuda_numbers.cuh"

namespace querypatch {
namespace cuda {

constexpr unsigned all_lanes = 0xffffffffu;

// A kernel for one number of channels, levels and points, and of lanes that share the channels:
// all samples of a head on the board at once, every loop unrolled.
template <class Value_, class Point_, class Weight_, int channels_, int levels_, int points_,
          int lanes_>
struct Fixed {
  using Value = Value_;
  using Point = Point_;
  using Weight = Weight_;
  using Real = typename Value::Real;
  static constexpr bool any = false;
  static constexpr int lanes = lanes_;
  static constexpr int warps = warps_per_block(lanes);
  static constexpr int threads = warps * lanes_per_warp;
  static constexpr int vector = lanes > 0 ? channels_ / lanes : 0;
  static constexpr int samples = levels_ * points_;
  static constexpr int points = points_;
  static constexpr int board = samples;
  static constexpr int own = (board + lanes - 1) / lanes;
  static constexpr int views = points % own == 0 ? 1 : own;  // levels that a lane's samples lie in
  static constexpr int unroll = 2;
  static constexpr bool merges = points > 1 && points <= 4;  // the corners of a level's samples
  // How many threads a multiprocessor is to hold, which bounds the registers of each (to 96; to 255
  // where a lane owns many samples). On an H200 384 to 1024 are equally fast, within 2 %.
  static constexpr int resident_threads = own > 4 ? 256 : 640;
  static_assert(lanes > 0 && samples > 0 && samples <= max_fixed_samples, "no such kernel");
};

// The kernel for any numbers, types of points and weights included: 32 lanes a head, one channel a
// lane and turn, samples by boards of 32.
template <class Value_>
struct Any {
  using Value = Value_;
  using Real = typename Value::Real;
  static constexpr bool any = true;
  static constexpr int lanes = lanes_per_warp;
  static constexpr int warps = warps_per_block(lanes);
  static constexpr int threads = warps * lanes_per_warp;
  static constexpr int vector = 1;
  static constexpr int board = 32;
  static constexpr int own = 1;
  static constexpr int views = 1;
  static constexpr int unroll = 1;
  static constexpr bool merges = false;
  static constexpr int resident_threads = 512;
};

template <class Shape>
__device__ __forceinline__ int samples_of(const Arguments& a) {
  if constexpr (Shape::any) return a.levels * a.points_per_level;
  else return Shape::samples;
}

template <class Shape>
__device__ __forceinline__ int points_of(const Arguments& a) {
  if constexpr (Shape::any) return a.points_per_level;
  else return Shape::points;
}

// Which head of which query a lane works on. Lanes past the last one repeat it and write nothing.
struct Place {
  int lane;         // of the head's lanes
  int slot;         // of the block's heads
  int query;
  int head;
  long long image;
  long long pair;   // (image, query, head), counted through
  bool active;
};

template <class Shape>
__device__ __forceinline__ Place place(const Arguments& a) {
  constexpr int per_block = Shape::threads / Shape::lanes;
  const int pairs = a.queries * a.heads;
  Place at;
  at.lane = threadIdx.x % Shape::lanes;
  at.slot = threadIdx.x / Shape::lanes;
  const int wanted = static_cast<int>(blockIdx.x) * per_block + at.slot;
  at.active = wanted < pairs;
  const int pair = at.active ? wanted : pairs - 1;
  at.query = static_cast<unsigned>(pair) / static_cast<unsigned>(a.heads);
  at.head = pair - at.query * a.heads;
  at.image = static_cast<long long>(a.first_image) + blockIdx.y;
  at.pair = at.image * pairs + pair;
  return at;
}

// The sum over the lanes of a head, the same in each.
template <class Shape, class Real>
__device__ __forceinline__ Real sum_over_head(Real number) {
#pragma unroll
  for (int other = 1; other < Shape::lanes; other *= 2)
    number += __shfl_xor_sync(all_lanes, number, other);
  return number;
}

template <class Shape, class Real>
__device__ __forceinline__ Real greatest_over_head(Real number) {
#pragma unroll
  for (int other = 1; other < Shape::lanes; other *= 2)
    number = greatest(number, __shfl_xor_sync(all_lanes, number, other));
  return number;
}

// The lane's own samples of a board that starts at sample `first`: a number per sample, `each` of
// them where a sample has several; 0 past the last sample.
template <class Shape, class Number, int each>
__device__ __forceinline__ void read_own(const void* tensor, const Place& at, int samples,
                                         typename Shape::Real* to) {
  constexpr int count = Shape::own * each;
  const int sample = at.lane * Shape::own;
  const auto* from = static_cast<const typename Number::Stored*>(tensor) +
                     (at.pair * samples + sample) * each;
  if constexpr (Shape::board % Shape::own == 0) {
    if (sample < samples) {
      read_many<Number, count>(from, to);
    } else {
#pragma unroll
      for (int i = 0; i < count; i++) to[i] = 0;
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; i++) {
      const bool there = sample + i / each < samples;
      to[i] = there ? Number::read(__ldg(from + i)) : typename Shape::Real(0);
    }
  }
}

template <class Shape>
__device__ __forceinline__ void read_points(const Arguments& a, const Place& at, int first,
                                            typename Shape::Real (&to)[2 * Shape::own]) {
  const int samples = samples_of<Shape>(a);
  if constexpr (Shape::any) {
    const int sample = first + at.lane;
    const long long index = (at.pair * samples + sample) * 2;
    using Real = typename Shape::Real;
    to[0] = sample < samples ? read_tagged<Real>(a.points, index, a.point_tag) : Real(0);
    to[1] = sample < samples ? read_tagged<Real>(a.points, index + 1, a.point_tag) : Real(0);
  } else {
    read_own<Shape, typename Shape::Point, 2>(a.points, at, samples, to);
  }
}

template <class Shape>
__device__ __forceinline__ void read_weights(const Arguments& a, const Place& at, int first,
                                             typename Shape::Real (&to)[Shape::own]) {
  const int samples = samples_of<Shape>(a);
  if constexpr (Shape::any) {
    const int sample = first + at.lane;
    using Real = typename Shape::Real;
    const long long index = at.pair * samples + sample;
    to[0] = sample < samples ? read_tagged<Real>(a.weights, index, a.weight_tag) : Real(0);
  } else {
    read_own<Shape, typename Shape::Weight, 1>(a.weights, at, samples, to);
  }
}

// What turns a weight as it was given into an attention weight. The classic operator's already is
// one.
template <class Real>
struct Softmax {
  bool wanted;
  Real largest;
  Real inverse_sum;

  __device__ __forceinline__ Real operator()(Real weight) const {
    return wanted ? exponential(weight - largest) * inverse_sum : weight;
  }
};

template <class Shape>
__device__ __forceinline__ Softmax<typename Shape::Real> softmax(const Arguments& a,
                                                                 const Place& at) {
  using Real = typename Shape::Real;
  Softmax<Real> over{a.coordinates != 0, Real(0), Real(1)};
  if (!over.wanted) return over;
  const int samples = samples_of<Shape>(a);
  Real logits[Shape::own];
  over.largest = static_cast<Real>(__uint_as_float(0xff800000u));  // minus infinity
  for (int first = 0; first < samples; first += Shape::board) {
    read_weights<Shape>(a, at, first, logits);
#pragma unroll
    for (int i = 0; i < Shape::own; i++)
      if (first + at.lane * Shape::own + i < samples)
        over.largest = greatest(over.largest, logits[i]);
  }
  over.largest = greatest_over_head<Shape>(over.largest);
  Real sum = 0;
  for (int first = 0; first < samples; first += Shape::board) {
    read_weights<Shape>(a, at, first, logits);
#pragma unroll
    for (int i = 0; i < Shape::own; i++)
      if (first + at.lane * Shape::own + i < samples) sum += exponential(logits[i] - over.largest);
  }
  over.inverse_sum = reciprocal(sum_over_head<Shape>(sum));
  return over;
}

// A level as the samples of a query see it: pixel = base + scale * point, on either axis.
template <class Real>
struct View {
  LevelSize level;
  Real columns;
  Real rows;
  Real base_x;
  Real base_y;
  Real scale_x;
  Real scale_y;
};

template <class Shape>
__device__ __forceinline__ View<typename Shape::Real> view_of(const Arguments& a, const Place& at,
                                                              int number) {
  using Real = typename Shape::Real;
  const Real half = static_cast<Real>(0.5);
  View<Real> view;
  view.level = a.level[number];
  view.columns = view.scale_x = static_cast<Real>(view.level.columns);
  view.rows = view.scale_y = static_cast<Real>(view.level.rows);
  view.base_x = view.base_y = -half;
  if (a.coordinates == 0) return view;
  const Real* reference =
      static_cast<const Real*>(a.references) +
      ((at.image * a.queries + at.query) * a.levels + number) * a.coordinates;
  view.base_x = fused(__ldg(reference), view.columns, -half);
  view.base_y = fused(__ldg(reference + 1), view.rows, -half);
  view.scale_x = view.scale_y = 1;
  if (a.coordinates == 2) return view;
  const Real reach = half / static_cast<Real>(points_of<Shape>(a));
  view.scale_x = __ldg(reference + 2) * view.columns * reach;
  view.scale_y = __ldg(reference + 3) * view.rows * reach;
  return view;
}

// The four cells around a sample: top left, top right, bottom left, bottom right.
struct alignas(16) Tokens {
  int corner[4];
};

template <class Real>
struct alignas(16) Corners {
  Real corner[4];
};

// What the lane that owns a sample remembers of it.
template <class Real>
struct Sample {
  Real right;       // how far from the left cells to the right ones, 0 to 1
  Real down;
  Real weight;      // attention weight
  unsigned inside;  // bit c: corner c lies in the level
};

template <class Shape, bool backward>
struct Board {
  static constexpr int slots = Shape::threads / Shape::lanes;
  static constexpr int width = Shape::board | 1;  // odd, so that slots start in different banks
  Tokens tokens[slots][width];
  Corners<typename Shape::Real> weights[slots][width];
  Corners<typename Shape::Real> dots[backward ? slots : 1][backward ? width : 1];
};

__device__ __forceinline__ int clamped(int cell, int size) { return min(max(cell, 0), size - 1); }

// Tokens and weights of one sample. Corners outside the level weigh 0 and stand for the nearest
// cell inside; a location that is not a number lies outside.
template <class Real>
__device__ __forceinline__ void locate(const LevelSize& level, Real x, Real y, Sample<Real>& sample,
                                       Tokens& tokens, Corners<Real>& weights) {
  const Real one = 1, none = 0;
  x = least(greatest(x, Real(-2)), static_cast<Real>(level.columns) + one);
  y = least(greatest(y, Real(-2)), static_cast<Real>(level.rows) + one);
  const Real left = floored(x), top = floored(y);
  const int x0 = static_cast<int>(left), y0 = static_cast<int>(top);
  sample.right = x - left;
  sample.down = y - top;
  const bool in_left = static_cast<unsigned>(x0) < static_cast<unsigned>(level.columns);
  const bool in_right = static_cast<unsigned>(x0 + 1) < static_cast<unsigned>(level.columns);
  const bool in_top = static_cast<unsigned>(y0) < static_cast<unsigned>(level.rows);
  const bool in_bottom = static_cast<unsigned>(y0 + 1) < static_cast<unsigned>(level.rows);
  sample.inside = (in_left && in_top ? 1u : 0u) | (in_right && in_top ? 2u : 0u) |
                  (in_left && in_bottom ? 4u : 0u) | (in_right && in_bottom ? 8u : 0u);
  const Real to_left = in_left ? one - sample.right : none;
  const Real to_right = in_right ? sample.right : none;
  const Real to_top = in_top ? sample.weight * (one - sample.down) : none;
  const Real to_bottom = in_bottom ? sample.weight * sample.down : none;
  weights = {{to_left * to_top, to_right * to_top, to_left * to_bottom, to_right * to_bottom}};
  const int c0 = clamped(x0, level.columns), c1 = clamped(x0 + 1, level.columns);
  const int r0 = level.start + clamped(y0, level.rows) * level.columns;
  const int r1 = level.start + clamped(y0 + 1, level.rows) * level.columns;
  // A level without cells yields numbers around `start`: kept on a token, whose weight is 0.
  tokens = {{max(r0 + c0, 0), max(r0 + c1, 0), max(r1 + c0, 0), max(r1 + c1, 0)}};
}

// Writes the board of the samples from `first` on, and returns how many it has.
template <class Shape, bool backward>
__device__ __forceinline__ int write_board(const Arguments& a, const Place& at, int first,
                                           const Softmax<typename Shape::Real>& attention,
                                           Board<Shape, backward>& board,
                                           View<typename Shape::Real> (&views)[Shape::views],
                                           Sample<typename Shape::Real> (&own)[Shape::own]) {
  using Real = typename Shape::Real;
  const int samples = samples_of<Shape>(a);
#pragma unroll
  for (int v = 0; v < Shape::views; v++) {
    const int spot = min(first + at.lane * Shape::own + v, samples - 1);
    views[v] = view_of<Shape>(
        a, at, static_cast<unsigned>(spot) / static_cast<unsigned>(points_of<Shape>(a)));
  }
  Real point[2 * Shape::own], weight[Shape::own];
  read_points<Shape>(a, at, first, point);
  read_weights<Shape>(a, at, first, weight);
  __syncwarp();  // the last board was read
#pragma unroll
  for (int i = 0; i < Shape::own; i++) {
    const int spot = at.lane * Shape::own + i;
    own[i] = {};
    if (first + spot >= samples || spot >= Shape::board) continue;
    const View<Real>& view = views[Shape::views == 1 ? 0 : i];
    const Real given = attention(weight[i]);
    own[i].weight = at.active ? given : Real(0);
    locate(view.level, fused(point[2 * i], view.scale_x, view.base_x),
           fused(point[2 * i + 1], view.scale_y, view.base_y), own[i],
           board.tokens[at.slot][spot], board.weights[at.slot][spot]);
  }
  __syncwarp();
  return samples - first < Shape::board ? samples - first : Shape::board;
}

}  // namespace cuda
}  // namespace querypatch
