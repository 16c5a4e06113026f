// Where the samples of one query and head lie: corners, their weights, and back.

template <class T>
struct Arithmetic {
  using type = Single;
};
template <>
struct Arithmetic<double> {
  using type = Double;
};

QUERYPATCH_INLINE int64_t padded(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// An array of any type as numbers: `count` of them from element `at`, zeros up to full vectors.
template <class T, class Real>
QUERYPATCH_INLINE void read_as(const T* from, int64_t count, Real* to) {
  constexpr int width = Arithmetic<Real>::type::width;
  int64_t i = 0;
  for (; i + width <= count; i += width) store(to + i, load(from + i));
  if (i == count) return;
  T rest[width] = {};
  __builtin_memcpy(rest, from + i, static_cast<size_t>(count - i) * sizeof(T));
  store(to + i, load(rest));
}
template <class T, class Real>
QUERYPATCH_INLINE void write_as(T* to, int64_t count, const Real* from) {
  constexpr int width = Arithmetic<Real>::type::width;
  int64_t i = 0;
  for (; i + width <= count; i += width) store(to + i, load(from + i));
  if (i == count) return;
  T rest[width];
  store(rest, load(from + i));
  __builtin_memcpy(to + i, rest, static_cast<size_t>(count - i) * sizeof(T));
}
QUERYPATCH_SHARED void read(Number type, const void* from, int64_t at, int64_t count, float* to) {
  switch (type) {
    case Number::bfloat16:
      return read_as(static_cast<const BFloat16*>(from) + at, count, to);
    case Number::float16:
      return read_as(static_cast<const Half*>(from) + at, count, to);
    default:
      return read_as(static_cast<const float*>(from) + at, count, to);
  }
}
QUERYPATCH_SHARED void read(Number, const void* from, int64_t at, int64_t count, double* to) {
  read_as(static_cast<const double*>(from) + at, count, to);
}
QUERYPATCH_SHARED void write(Number type, void* to, int64_t at, int64_t count, const float* from) {
  switch (type) {
    case Number::bfloat16:
      return write_as(static_cast<BFloat16*>(to) + at, count, from);
    case Number::float16:
      return write_as(static_cast<Half*>(to) + at, count, from);
    default:
      return write_as(static_cast<float*>(to) + at, count, from);
  }
}
QUERYPATCH_SHARED void write(Number, void* to, int64_t at, int64_t count, const double* from) {
  write_as(static_cast<double*>(to) + at, count, from);
}

// Memory for `arrays` rows of `length` numbers each, with room for a vector more at the end.
template <class Real>
class Arrays {
 public:
  Arrays(int64_t arrays, int64_t length)
      : length_(padded(length, 16)),
        memory_(static_cast<Real*>(allocate((arrays * length_ + 16) * int64_t{sizeof(Real)}))) {}
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;
  ~Arrays() { release(memory_); }
  bool missing() const { return memory_ == nullptr; }
  Real* operator[](int64_t array) const { return memory_ + array * length_; }

 private:
  int64_t length_;
  Real* memory_;
};

// Levels [first, last) of a problem: one lane for each of their samples, level after level.
template <class A>
struct Lattice {
  using Real = typename A::Real;
  using Integer = typename A::Integer;

  Lattice(const Problem& p, int64_t first, int64_t last, int64_t row_elements)
      : first_level(first),
        num_levels(last - first),
        first_sample(first * p.points),
        samples((last - first) * p.points),
        lanes(padded(samples, A::width)),
        first_token(first < last ? p.level[first].start : 0),
        reals(2, lanes),
        integers(4, lanes) {
    if (missing()) return;
    for (int64_t level = first; level < last; level++)
      tokens += p.level[level].rows * p.level[level].columns;
    for (int64_t i = 0; i < lanes; i++) {
      const Level at = i < samples ? p.level[first + i / p.points] : Level{0, 0, first_token};
      reals[0][i] = static_cast<Real>(at.columns);
      reals[1][i] = static_cast<Real>(at.rows);
      integers[0][i] = static_cast<Integer>(at.columns);
      integers[1][i] = static_cast<Integer>(at.rows);
      integers[2][i] = static_cast<Integer>((at.start - first_token) * row_elements);
      integers[3][i] = static_cast<Integer>(at.columns * row_elements);
    }
  }
  bool missing() const { return reals.missing() || integers.missing(); }
  const Real* columns() const { return reals[0]; }
  const Real* rows() const { return reals[1]; }

  int64_t first_level, num_levels, first_sample, samples, lanes, first_token;
  int64_t tokens = 0;
  Arrays<Real> reals;
  Arrays<Integer> integers;
};

// Of one query and head, an array of lanes each; corners are (row, column) 00, 01, 10, 11.
template <class A>
struct Samples {
  using Real = typename A::Real;
  using Integer = typename A::Integer;

  explicit Samples(int64_t lanes)
      : reals(18, 2 * lanes),
        integers(4, lanes),
        x(reals[0]),
        y(reals[1]),
        weight(reals[2]),
        pairs(reals[3]),
        right(reals[4]),
        below(reals[5]),
        grad_x(reals[6]),
        grad_y(reals[7]),
        grad_weight(reals[8]),
        dot(reals[9]),  // two rows: four corners a lane
        size_x(reals[15]),
        size_y(reals[16]) {
    for (int c = 0; c < 4; c++) {
      corner_weight[c] = reals[11 + c];
      corner_at[c] = integers[c];
    }
  }
  bool missing() const { return reals.missing() || integers.missing(); }

  Arrays<Real> reals;
  Arrays<Integer> integers;
  Real *x, *y;              // in cells; the first cell's centre is (0, 0)
  Real* weight;             // attention weights
  Real* pairs;              // x, y, x, y as they lie in memory
  Real *right, *below;      // how far from the upper left corner, in cells
  Real *grad_x, *grad_y, *grad_weight;
  Real* dot;                // <grad_output, row of a corner>, sample after sample
  Real *size_x, *size_y;    // of the references' boxes, in cells
  Real* corner_weight[4];
  Integer* corner_at[4];    // element offset of the corner's row
};

template <class A>
QUERYPATCH_INLINE void softmax(int64_t samples, int64_t lanes, typename A::Real* logits) {
  using V = typename A::Vector;
  for (int64_t i = samples; i < lanes; i++) logits[i] = logits[0];
  V highest = load(logits);
  for (int64_t i = A::width; i < lanes; i += A::width) {
    const V v = load(logits + i);
    highest = choose((typename A::Integers)(v > highest), v, highest);
  }
  const V top = all<A>(lane_max<A>(highest));
  for (int64_t i = 0; i < lanes; i += A::width)
    store(logits + i, exponential(load(logits + i) - top));
  for (int64_t i = samples; i < lanes; i++) logits[i] = 0;
  V sum = {};
  for (int64_t i = 0; i < lanes; i += A::width) sum += load(logits + i);
  const V share = 1 / all<A>(lane_sum<A>(sum));
  for (int64_t i = 0; i < lanes; i += A::width) store(logits + i, load(logits + i) * share);
}

// Spreads a number of each level over its lanes; four points are the usual case.
template <class A, int... K>
QUERYPATCH_INLINE typename A::Vector four_of_each(const typename A::Real* of, int64_t step,
                                                  Lanes<K...>) {
  return typename A::Vector{of[K / 4 * step]...};
}
template <class A>
QUERYPATCH_INLINE void spread(const Lattice<A>& lattice, int64_t points,
                              const typename A::Real* of, int64_t step, typename A::Real* to) {
  if (points == 4 && A::width >= 4 && lattice.samples == lattice.lanes) {
    for (int64_t i = 0; i < lattice.lanes; i += A::width)
      store(to + i, four_of_each<A>(of + i / 4 * step, step, AllLanes<A>{}));
    return;
  }
  for (int64_t level = 0; level < lattice.num_levels; level++)
    for (int64_t p = 0; p < points; p++) to[level * points + p] = of[level * step];
}

template <class A>
QUERYPATCH_INLINE void split_pairs(int64_t lanes, Samples<A>& s) {
  for (int64_t i = 0; i < lanes; i += A::width) {
    const auto a = load(s.pairs + 2 * i), b = load(s.pairs + 2 * i + A::width);
    store(s.x + i, every_second<A>(a, b, AllLanes<A>{}));
    store(s.y + i, every_other<A>(a, b, AllLanes<A>{}));
  }
}

// The weights of query and head number `row` = (batch * queries + query) * heads + head: all of
// them for the softmax, of the lattice's levels for the classic operator.
template <class A>
QUERYPATCH_SHARED void read_weights(const Problem& p, const Lattice<A>& lattice,
                                    const void* weights, int64_t row, typename A::Real* to) {
  const int64_t at = row * p.levels * p.points + lattice.first_sample;
  read(p.weight_type, weights, at, lattice.samples, to);
  if (p.coordinates && lattice.samples) softmax<A>(lattice.samples, lattice.lanes, to);
}

QUERYPATCH_INLINE int64_t bytes_of(Number type) {
  return type == Number::float64 ? 8 : type == Number::float32 ? 4 : 2;
}

// Asks for `count` numbers from element `at` on. Those of one head lie a query apart, a stride that
// the machine does not foresee: without this most of the time is spent waiting (measured).
template <int Write = 0>
QUERYPATCH_INLINE void prefetch(Number type, const void* from, int64_t at, int64_t count) {
  const char* const first = static_cast<const char*>(from) + at * bytes_of(type);
  for (int64_t byte = 0; byte < count * bytes_of(type); byte += 64)
    __builtin_prefetch(first + byte, Write);
}

constexpr int64_t queries_ahead = 3;

// Not a function of its own: gcc would find that it does nothing and leave it out.
template <class A>
QUERYPATCH_INLINE void prefetch_samples(const Problem& p, const Lattice<A>& lattice,
                                        const void* points, const void* weights, int64_t row) {
  const int64_t at =
      (row + queries_ahead * p.heads) * p.levels * p.points + lattice.first_sample;
  prefetch(p.point_type, points, 2 * at, 2 * lattice.samples);
  prefetch(p.weight_type, weights, at, lattice.samples);
}

// x and y in cells.
template <class A>
QUERYPATCH_SHARED void locate(const Problem& p, const Lattice<A>& lattice, const void* points,
                              const void* references, int64_t row, Samples<A>& s) {
  using Real = typename A::Real;
  const int64_t at = row * p.levels * p.points + lattice.first_sample;
  read(p.point_type, points, 2 * at, 2 * lattice.samples, s.pairs);
  split_pairs<A>(lattice.lanes, s);
  const Real half = Real(0.5);
  if (!p.coordinates) {
    for (int64_t i = 0; i < lattice.lanes; i += A::width) {
      store(s.x + i, load(s.x + i) * load(lattice.columns() + i) - half);
      store(s.y + i, load(s.y + i) * load(lattice.rows() + i) - half);
    }
    return;
  }
  const int64_t reference = (row / p.heads * p.levels + lattice.first_level) * p.coordinates;
  const Real* from = static_cast<const Real*>(references) + reference;
  spread<A>(lattice, p.points, from, p.coordinates, s.grad_x);
  spread<A>(lattice, p.points, from + 1, p.coordinates, s.grad_y);
  if (p.coordinates == 4) {
    spread<A>(lattice, p.points, from + 2, 4, s.size_x);
    spread<A>(lattice, p.points, from + 3, 4, s.size_y);
    const Real share = half / static_cast<Real>(p.points);
    for (int64_t i = 0; i < lattice.lanes; i += A::width) {
      store(s.size_x + i, load(s.size_x + i) * load(lattice.columns() + i) * share);
      store(s.size_y + i, load(s.size_y + i) * load(lattice.rows() + i) * share);
      store(s.x + i, load(s.x + i) * load(s.size_x + i));
      store(s.y + i, load(s.y + i) * load(s.size_y + i));
    }
  }
  for (int64_t i = 0; i < lattice.lanes; i += A::width) {
    const auto centre_x = load(s.grad_x + i) * load(lattice.columns() + i) - half;
    const auto centre_y = load(s.grad_y + i) * load(lattice.rows() + i) - half;
    store(s.x + i, centre_x + load(s.x + i));
    store(s.y + i, centre_y + load(s.y + i));
  }
}

// The corners of located samples. One outside its level gets the row `outside` and no weight; so
// does every corner of a location that is not a number.
template <class A>
QUERYPATCH_SHARED void find_corners(const Lattice<A>& lattice, int64_t row_elements,
                                    int64_t outside, Samples<A>& s) {
  using V = typename A::Vector;
  using I = typename A::Integers;
  using Integer = typename A::Integer;
  const I nowhere = static_cast<Integer>(outside) + I{};
  const Integer element = static_cast<Integer>(row_elements);
  for (int64_t i = 0; i < lattice.lanes; i += A::width) {
    const V columns = load(lattice.columns() + i), rows = load(lattice.rows() + i);
    V x = load(s.x + i), y = load(s.y + i);
    // Comparisons with NaN are false: it goes to -2, as what is far to the left does.
    x = choose((I)(x > -2), x, all<A>(-2));
    y = choose((I)(y > -2), y, all<A>(-2));
    x = choose((I)(x < columns + 1), x, columns + 1);
    y = choose((I)(y < rows + 1), y, rows + 1);
    const I column = floored<A>(x), row = floored<A>(y);
    const V right = x - real(column), below = y - real(row);
    const I num_columns = load(lattice.integers[0] + i), num_rows = load(lattice.integers[1] + i);
    const I left_in = (I)(column >= 0) & (I)(column < num_columns);
    const I right_in = (I)(column >= -1) & (I)(column + 1 < num_columns);
    const I above_in = (I)(row >= 0) & (I)(row < num_rows);
    const I below_in = (I)(row >= -1) & (I)(row + 1 < num_rows);
    const I down = load(lattice.integers[3] + i);
    const I at = load(lattice.integers[2] + i) + row * down + column * element;
    const V weight = load(s.weight + i);
    const V above_share = weight * (1 - below), below_share = weight * below;
    store(s.right + i, right);
    store(s.below + i, below);
    const I in[4] = {left_in & above_in, right_in & above_in, left_in & below_in,
                     right_in & below_in};
    const I where[4] = {at, at + element, at + down, at + down + element};
    const V share[4] = {above_share * (1 - right), above_share * right,
                        below_share * (1 - right), below_share * right};
    for (int c = 0; c < 4; c++) {
      store(s.corner_at[c] + i, choose(in[c], where[c], nowhere));
      store(s.corner_weight[c] + i, choose(in[c], share[c], V{}));
    }
  }
}
