// The backward pass. Every number of a gradient has one task that adds to it, in the order of the
// queries: no locks, and the same bits for any number of threads. A task is one image and head, or
// with many threads one image, head and level; both add in the same order.

// The rows of one task: values and their gradients, where corners of `samples` find them.
template <class Real>
struct TaskRows {
  const Real* value;
  Real* gradient;
  const Real* zeros;  // read for corners outside, where rows stay in place
  Real* unwanted;     // written for them
};

// Adds <grad, row> of every corner to s.dot (Points) and weight * grad to its gradient (Value), for
// N vectors of channels.
template <class A, int N, bool InPlace, bool Value, bool Points>
QUERYPATCH_INLINE void scatter(const TaskRows<typename A::Real>& rows, int64_t first_channel,
                               int64_t lanes, const typename A::Real* grad, Samples<A>& s) {
  using V = typename A::Vector;
  V g[N];
  for (int v = 0; v < N; v++) g[v] = load(grad + first_channel + v * A::width);
  for (int64_t k = 0; k < lanes; k += together<A>) {
    V products[4 * together<A>];
    for (int i = 0; i < together<A>; i++) {
      for (int c = 0; c < 4; c++) {
        const auto at = s.corner_at[c][k + i];
        const bool outside = InPlace && at < 0;
        if constexpr (Points) {
          const auto* row =
              in_register((outside ? rows.zeros : rows.value + at) + first_channel);
          V product = g[0] * load(row);
          for (int v = 1; v < N; v++) product += g[v] * load(row + v * A::width);
          products[4 * i + c] = product;
        }
        if constexpr (Value) {
          auto* row =
              in_register((outside ? rows.unwanted : rows.gradient + at) + first_channel);
          const V weight = all<A>(s.corner_weight[c][k + i]);
          for (int v = 0; v < N; v++) {
            auto* place = row + v * A::width;
            store(place, load(place) + weight * g[v]);
          }
        }
      }
    }
    if constexpr (Points) add_sums(products, s.dot + 4 * k);
  }
}

template <class A, bool InPlace, bool Value, bool Points>
QUERYPATCH_INLINE void scatter_channels(const TaskRows<typename A::Real>& rows, int64_t channels,
                                        const Lattice<A>& lattice, const typename A::Real* grad,
                                        Samples<A>& s) {
  const int64_t lanes = padded(lattice.samples, together<A>);
  if constexpr (Points) set_zero<A>(s.dot, 4 * lattice.lanes);
  int64_t done = 0;
  const auto some = [&](auto vectors) {
    constexpr int n = decltype(vectors)::count;
    for (; channels - done >= n * A::width; done += n * A::width)
      scatter<A, n, InPlace, Value, Points>(rows, done, lanes, grad, s);
  };
  for_vectors<most_vectors<A>>(some);
}

// From the corners' products to the gradients of x, y (in cells) and of the attention weight.
template <class A>
QUERYPATCH_SHARED void combine_corners(int64_t lanes, Samples<A>& s) {
  using V = typename A::Vector;
  const auto every = AllLanes<A>{};
  for (int64_t i = 0; i < lanes; i += A::width) {
    const typename A::Real* dot = s.dot + 4 * i;
    const V a = load(dot), b = load(dot + A::width);
    const V c = load(dot + 2 * A::width), d = load(dot + 3 * A::width);
    const V left_ab = every_second<A>(a, b, every), left_cd = every_second<A>(c, d, every);
    const V right_ab = every_other<A>(a, b, every), right_cd = every_other<A>(c, d, every);
    const V d00 = every_second<A>(left_ab, left_cd, every);
    const V d10 = every_other<A>(left_ab, left_cd, every);
    const V d01 = every_second<A>(right_ab, right_cd, every);
    const V d11 = every_other<A>(right_ab, right_cd, every);
    const V right = load(s.right + i), below = load(s.below + i), weight = load(s.weight + i);
    const V above_sum = d00 + right * (d01 - d00), below_sum = d10 + right * (d11 - d10);
    store(s.grad_weight + i, above_sum + below * (below_sum - above_sum));
    store(s.grad_y + i, weight * (below_sum - above_sum));
    store(s.grad_x + i, weight * ((d01 - d00) + below * ((d11 - d10) - (d01 - d00))));
  }
}

// Writes s.x and s.y, one pair after the other.
template <class A>
QUERYPATCH_INLINE void write_pairs(const Problem& p, const Lattice<A>& lattice, void* to,
                                   int64_t row, Samples<A>& s) {
  const auto every = AllLanes<A>{};
  for (int64_t i = 0; i < lattice.lanes; i += A::width) {
    const auto x = load(s.x + i), y = load(s.y + i);
    store(s.pairs + 2 * i, zipped<A, 0>(x, y, every));
    store(s.pairs + 2 * i + A::width, zipped<A, A::width / 2>(x, y, every));
  }
  const int64_t at = row * p.levels * p.points + lattice.first_sample;
  write(p.point_type, to, 2 * at, 2 * lattice.samples, s.pairs);
}

// The classic operator's gradients of one query, head and the lattice's levels.
template <class A>
QUERYPATCH_SHARED void finish_classic(const Problem& p, const BackwardTensors& t,
                                      const Lattice<A>& lattice, int64_t row, Samples<A>& s) {
  if (t.grad_points) {
    for (int64_t i = 0; i < lattice.lanes; i += A::width) {
      store(s.x + i, load(s.grad_x + i) * load(lattice.columns() + i));
      store(s.y + i, load(s.grad_y + i) * load(lattice.rows() + i));
    }
    write_pairs(p, lattice, t.grad_points, row, s);
  }
  const int64_t at = row * p.levels * p.points + lattice.first_sample;
  if (t.grad_weights) write(p.weight_type, t.grad_weights, at, lattice.samples, s.grad_weight);
}

// The fused operator's gradients of one query and head, all levels; s.weight holds the softmax and
// s.size_x, s.size_y the boxes' sizes. The softmax's gradient is w * (g - sum of w * g).
template <class A>
QUERYPATCH_SHARED void finish_fused(const Problem& p, const BackwardTensors& t,
                                    const Lattice<A>& lattice, int64_t row, Samples<A>& s) {
  using V = typename A::Vector;
  if (t.grad_points) {
    for (int64_t i = 0; i < lattice.lanes; i += A::width) {
      V x = load(s.grad_x + i), y = load(s.grad_y + i);
      if (p.coordinates == 4) {
        x *= load(s.size_x + i);
        y *= load(s.size_y + i);
      }
      store(s.x + i, x);
      store(s.y + i, y);
    }
    write_pairs(p, lattice, t.grad_points, row, s);
  }
  if (!t.grad_weights) return;
  for (int64_t i = lattice.samples; i < lattice.lanes; i++) s.grad_weight[i] = 0;
  V mean = {};
  for (int64_t i = 0; i < lattice.lanes; i += A::width)
    mean += load(s.weight + i) * load(s.grad_weight + i);
  const V middle = all<A>(lane_sum<A>(mean));
  for (int64_t i = 0; i < lattice.lanes; i += A::width)
    store(s.grad_weight + i, load(s.weight + i) * (load(s.grad_weight + i) - middle));
  const int64_t at = row * p.levels * p.points;
  write(p.weight_type, t.grad_weights, at, lattice.samples, s.grad_weight);
}
