// How the backward pass is parted into tasks, and what is left for after them.

// What the fused operator keeps of each query, head and sample for after the tasks: gradients of x,
// of y (in cells) and of the weight. Needed where a task has one level only (the softmax's gradient
// takes all) and for the references, which all heads share.
template <class Real>
struct Kept {
  Real* x;
  Real* y;
  Real* weight;
};

template <class A>
QUERYPATCH_INLINE void keep(const Lattice<A>& lattice, int64_t at, const Samples<A>& s,
                            const Kept<typename A::Real>& kept) {
  const size_t bytes = static_cast<size_t>(lattice.samples) * sizeof(typename A::Real);
  __builtin_memcpy(kept.x + at, s.grad_x, bytes);
  __builtin_memcpy(kept.y + at, s.grad_y, bytes);
  __builtin_memcpy(kept.weight + at, s.grad_weight, bytes);
}

template <class A>
struct Backward {
  using Real = typename A::Real;
  const Problem& p;
  const BackwardTensors& t;
  const Lattice<A>& whole;
  Kept<Real> kept;

  bool needs_points() const { return t.grad_points || t.grad_weights || t.grad_references; }
};

// All queries of one image and head, at the lattice's levels.
template <class A>
struct Walk {
  const Lattice<A>& lattice;
  TaskRows<typename A::Real> rows;
  int64_t row_elements;
  int64_t outside;
  int64_t image;
  int64_t head;
};

template <class A, bool InPlace, bool Value, bool Points>
void walk_queries(const Backward<A>& work, const Walk<A>& walk, typename A::Real* grad,
                  Samples<A>& s) {
  const Problem& p = work.p;
  const Lattice<A>& lattice = walk.lattice;
  const Lattice<A>& weighed = p.coordinates ? work.whole : lattice;
  const int64_t channels = row_channels<A>(p);
  typename A::Real* const weights = s.weight;
  s.weight += lattice.first_sample - weighed.first_sample;
  for (int64_t q = 0; q < p.queries; q++) {
    const int64_t row = (walk.image * p.queries + q) * p.heads + walk.head;
    prefetch_samples(p, lattice, work.t.points, work.t.weights, row);
    prefetch(p.value_type, work.t.grad_output, (row + queries_ahead * p.heads) * p.channels,
             p.channels);
    read(p.value_type, work.t.grad_output, row * p.channels, p.channels, grad);
    read_weights(p, weighed, work.t.weights, row, weights);
    locate(p, lattice, work.t.points, work.t.references, row, s);
    find_corners(lattice, walk.row_elements, walk.outside, s);
    scatter_channels<A, InPlace, Value, Points>(walk.rows, channels, lattice, grad, s);
    if constexpr (Points) {
      combine_corners(lattice.lanes, s);
      if (!p.coordinates)
        finish_classic(p, work.t, lattice, row, s);
      else if (work.kept.x)
        keep(lattice, row * p.levels * p.points + lattice.first_sample, s, work.kept);
      else
        finish_fused(p, work.t, lattice, row, s);
    }
  }
  s.weight = weights;
}

template <class A, bool InPlace>
void walk_queries(const Backward<A>& work, const Walk<A>& walk, typename A::Real* grad,
                  Samples<A>& s) {
  if (work.t.grad_value && work.needs_points())
    walk_queries<A, InPlace, true, true>(work, walk, grad, s);
  else if (work.t.grad_value)
    walk_queries<A, InPlace, true, false>(work, walk, grad, s);
  else
    walk_queries<A, InPlace, false, true>(work, walk, grad, s);
}

// What a thread needs for one task after the other.
template <class A, bool InPlace>
struct TaskSpace {
  explicit TaskSpace(const Backward<A>& work)
      : samples(work.whole.lanes),
        rows(3, row_channels<A>(work.p)),
        values(!InPlace && work.needs_points(), slab_elements(work.p)),
        gradients(!InPlace && work.t.grad_value, slab_elements(work.p)) {
    if (!missing()) set_zero<A>(rows[0], row_channels<A>(work.p));
  }
  static int64_t slab_elements(const Problem& p) { return (p.tokens + 1) * row_channels<A>(p); }
  bool missing() const {
    return samples.missing() || rows.missing() || values.missing() || gradients.missing();
  }

  Samples<A> samples;
  Arrays<typename A::Real> rows;  // of zeros, of what nobody wants, of the output's gradient
  Arrays<typename A::Real> values, gradients;
};

// One image and head, rows side by side.
template <class A>
void backward_task(const Backward<A>& work, const Lattice<A>& lattice, int64_t image, int64_t head,
                   TaskSpace<A, false>& space) {
  const Problem& p = work.p;
  const int64_t channels = row_channels<A>(p), end = lattice.tokens * channels;
  typename A::Real *const values = space.values[0], *const gradients = space.gradients[0];
  if (work.needs_points())
    copy_slab<A>(p, work.t.value, image, head, lattice.first_token, lattice.tokens, values);
  if (work.t.grad_value) set_zero<A>(gradients, end + channels);
  const TaskRows<typename A::Real> rows{values, gradients, nullptr, nullptr};
  walk_queries<A, false>(work, Walk<A>{lattice, rows, channels, end, image, head}, space.rows[2],
                         space.samples);
  if (work.t.grad_value)
    write_slab<A>(p, work.t.grad_value, image, head, lattice.first_token, lattice.tokens,
                  gradients);
}

// One image and head, rows where they lie; the value's gradient is zero before.
template <class A>
void backward_task(const Backward<A>& work, const Lattice<A>& lattice, int64_t image, int64_t head,
                   TaskSpace<A, true>& space) {
  using Real = typename A::Real;
  const Problem& p = work.p;
  const int64_t stride = p.heads * p.channels;
  const int64_t first = (image * p.tokens + lattice.first_token) * stride + head * p.channels;
  Real* const gradient = static_cast<Real*>(work.t.grad_value);
  const TaskRows<Real> rows{static_cast<const Real*>(work.t.value) + first,
                            gradient ? gradient + first : nullptr, space.rows[0], space.rows[1]};
  walk_queries<A, true>(work, Walk<A>{lattice, rows, stride, -1, image, head}, space.rows[2],
                        space.samples);
}

// Adds one head's part to the gradients of a query's references; s.pairs holds the raw offsets.
template <class A>
QUERYPATCH_INLINE void add_to_references(const Problem& p, const Lattice<A>& lattice,
                                         const Samples<A>& s, typename A::Real* grad) {
  using Real = typename A::Real;
  const Real share = Real(0.5) / static_cast<Real>(p.points);
  for (int64_t i = 0; i < lattice.samples; i++) {
    Real* const to = grad + i / p.points * p.coordinates;
    const Real x = s.grad_x[i] * lattice.columns()[i], y = s.grad_y[i] * lattice.rows()[i];
    to[0] += x;
    to[1] += y;
    if (p.coordinates == 4) {
      to[2] += x * s.pairs[2 * i] * share;
      to[3] += y * s.pairs[2 * i + 1] * share;
    }
  }
}

// After the tasks, from what they kept: queries [begin, end) of the batch, all heads in turn.
template <class A>
const char* finish_kept(const Backward<A>& work, int64_t begin, int64_t end) {
  using Real = typename A::Real;
  const Problem& p = work.p;
  const Lattice<A>& lattice = work.whole;
  Samples<A> s(lattice.lanes);
  if (s.missing()) return no_memory();
  const size_t bytes = static_cast<size_t>(lattice.samples) * sizeof(Real);
  const int64_t coordinates = p.levels * p.coordinates;
  for (int64_t query = begin; query < end; query++) {
    Real* const grad = static_cast<Real*>(work.t.grad_references);
    if (grad) set_zero<A>(grad + query * coordinates, coordinates);
    for (int64_t row = query * p.heads; row < (query + 1) * p.heads; row++) {
      const int64_t at = row * lattice.samples;
      read_weights(p, lattice, work.t.weights, row, s.weight);
      locate(p, lattice, work.t.points, work.t.references, row, s);
      __builtin_memcpy(s.grad_x, work.kept.x + at, bytes);
      __builtin_memcpy(s.grad_y, work.kept.y + at, bytes);
      __builtin_memcpy(s.grad_weight, work.kept.weight + at, bytes);
      if (grad) add_to_references(p, lattice, s, grad + query * coordinates);
      finish_fused(p, work.t, lattice, row, s);
    }
  }
  return nullptr;
}

template <class A, bool InPlace>
const char* backward_tasks(const Backward<A>& work, bool by_level, int64_t row_elements) {
  const Problem& p = work.p;
  const int64_t parts = by_level ? p.levels : 1;
  return parts_in_parallel(p.batch * p.heads * parts, 1, [&](int64_t begin, int64_t end) {
    TaskSpace<A, InPlace> space(work);
    if (space.missing()) return no_memory();
    for (int64_t number = begin; number < end; number++) {
      const int64_t slice = number / parts, image = slice / p.heads, head = slice % p.heads;
      if (!by_level) {
        backward_task(work, work.whole, image, head, space);
        continue;
      }
      const Lattice<A> lattice(p, number % parts, number % parts + 1, row_elements);
      if (lattice.missing()) return no_memory();
      backward_task(work, lattice, image, head, space);
    }
    return static_cast<const char*>(nullptr);
  });
}

template <class A>
const char* backward_of(const Problem& p, const BackwardTensors& t) {
  using Real = typename A::Real;
  const bool same_type = p.value_type == Number::float32 || p.value_type == Number::float64;
  const bool in_place = same_type && rows_in_place<A>(p);
  const int64_t width = in_place ? p.heads * p.channels : row_channels<A>(p);
  if (!in_place && (p.tokens + 1) * width >= most_elements) return too_large();
  const bool by_level = p.levels > 1 && p.batch * p.heads < 2 * count_threads();
  const bool keeps = p.coordinates && (by_level || t.grad_references);
  const int64_t samples = p.levels * p.points;
  const Lattice<A> whole(p, 0, p.levels, width);
  const Arrays<Real> kept(keeps ? 3 : 0, p.batch * p.queries * p.heads * samples);
  if (whole.missing() || kept.missing()) return no_memory();
  Backward<A> work{p, t, whole, {nullptr, nullptr, nullptr}};
  if (keeps) work.kept = {kept[0], kept[1], kept[2]};
  if (in_place && t.grad_value)
    in_parallel(p.batch * p.tokens, 1024, [&](int64_t begin, int64_t end) {
      set_zero<A>(static_cast<Real*>(t.grad_value) + begin * width, (end - begin) * width);
    });
  const char* failure = in_place ? backward_tasks<A, true>(work, by_level, width)
                                 : backward_tasks<A, false>(work, by_level, width);
  if (failure || !keeps) return failure;
  return parts_in_parallel(p.batch * p.queries, 64, [&](int64_t begin, int64_t end) {
    return finish_kept(work, begin, end);
  });
}

const char* backward(const Problem& p, const BackwardTensors& t) {
  if (p.value_type == Number::float64) return backward_of<Double>(p, t);
  return backward_of<Single>(p, t);
}
