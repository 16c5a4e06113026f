// The forward pass: a task is one image, one head and a run of queries in their order.

constexpr int64_t queries_a_task = 256;

// N vectors of the weighted sum of rows. Two sets of sums keep enough additions in flight.
template <class A, class T, int N, bool InPlace>
QUERYPATCH_INLINE void gather(const T* rows, const T* zeros, int64_t samples, const Samples<A>& s,
                              typename A::Real* to) {
  using V = typename A::Vector;
  constexpr bool two_sets = N <= 4;
  V even[N] = {}, odd[N] = {};
  for (int64_t k = 0; k < samples; k++) {
    // Written out: a loop over the corners would keep the sums in memory (gcc 12).
    const auto corner = [&](int c, V* sum) QUERYPATCH_INLINE_LAMBDA {
      const auto at = s.corner_at[c][k];
      const T* row = in_register(InPlace && at < 0 ? zeros : rows + at);
      const V weight = all<A>(s.corner_weight[c][k]);
      for (int v = 0; v < N; v++) sum[v] += weight * load(row + v * A::width);
    };
    corner(0, even);
    corner(1, two_sets ? odd : even);
    corner(2, even);
    corner(3, two_sets ? odd : even);
  }
  for (int v = 0; v < N; v++) store(to + v * A::width, two_sets ? even[v] + odd[v] : even[v]);
}

template <class A, class T, bool InPlace>
QUERYPATCH_INLINE void gather_channels(const T* rows, const T* zeros, int64_t channels,
                                       int64_t samples, const Samples<A>& s,
                                       typename A::Real* to) {
  int64_t done = 0;
  const auto some = [&](auto vectors) {
    constexpr int n = decltype(vectors)::count;
    for (; channels - done >= n * A::width; done += n * A::width)
      gather<A, T, n, InPlace>(rows + done, zeros, samples, s, to + done);
  };
  for_vectors<most_vectors<A>>(some);
}

// Output of queries [begin, end) of an image and head, whose rows begin at `rows`.
template <class A, class T, bool InPlace>
const char* forward_run(const Problem& p, const ForwardTensors& t, const Lattice<A>& lattice,
                        const T* rows, int64_t row_elements, int64_t outside, int64_t image,
                        int64_t head, int64_t begin, int64_t end) {
  Samples<A> samples(lattice.lanes);
  const int64_t channels = row_channels<A>(p);
  Arrays<typename A::Real> sums(2, channels);
  if (samples.missing() || sums.missing()) return no_memory();
  set_zero<A>(sums[1], channels);
  const T* zeros = reinterpret_cast<const T*>(sums[1]);
  for (int64_t q = begin; q < end; q++) {
    const int64_t row = (image * p.queries + q) * p.heads + head;
    prefetch_samples(p, lattice, t.points, t.weights, row);
    prefetch<1>(p.value_type, t.output, (row + queries_ahead * p.heads) * p.channels, p.channels);
    read_weights(p, lattice, t.weights, row, samples.weight);
    locate(p, lattice, t.points, t.references, row, samples);
    find_corners(lattice, row_elements, outside, samples);
    gather_channels<A, T, InPlace>(rows, zeros, channels, lattice.samples, samples, sums[0]);
    write(p.value_type, t.output, row * p.channels, p.channels, sums[0]);
  }
  return nullptr;
}

// Runs `part(image, head, begin, end)` over heads and runs of queries of one image.
template <class Part>
const char* over_queries(const Problem& p, const Part& part) {
  const int64_t runs = (p.queries + queries_a_task - 1) / queries_a_task;
  return parts_in_parallel(p.heads * runs, 1, [&](int64_t first, int64_t last) {
    const char* failure = nullptr;
    for (int64_t task = first; task < last && !failure; task++) {
      const int64_t begin = task % runs * queries_a_task;
      const int64_t end = begin + queries_a_task < p.queries ? begin + queries_a_task : p.queries;
      failure = part(task / runs, begin, end);
    }
    return failure;
  });
}

template <class T>
const char* forward_in_place(const Problem& p, const ForwardTensors& t) {
  using A = typename Arithmetic<T>::type;
  const int64_t stride = p.heads * p.channels;
  const Lattice<A> lattice(p, 0, p.levels, stride);
  if (lattice.missing()) return no_memory();
  for (int64_t image = 0; image < p.batch; image++) {
    const T* rows = static_cast<const T*>(t.value) + image * p.tokens * stride;
    const char* failure = over_queries(p, [&](int64_t head, int64_t begin, int64_t end) {
      return forward_run<A, T, true>(p, t, lattice, rows + head * p.channels, stride, -1, image,
                                     head, begin, end);
    });
    if (failure) return failure;
  }
  return nullptr;
}

// Heads in turn, each thread with one slab that it fills again: it stays in the cache.
template <class A>
const char* forward_by_heads(const Problem& p, const ForwardTensors& t, const Lattice<A>& lattice,
                             int64_t begin, int64_t end) {
  using Real = typename A::Real;
  const int64_t width = row_channels<A>(p);
  const Arrays<Real> slab(1, (p.tokens + 1) * width);
  if (slab.missing()) return no_memory();
  const char* failure = nullptr;
  for (int64_t slice = begin; slice < end && !failure; slice++) {
    const int64_t image = slice / p.heads, head = slice % p.heads;
    copy_slab<A>(p, t.value, image, head, 0, p.tokens, slab[0]);
    failure = forward_run<A, Real, false>(p, t, lattice, slab[0], width, p.tokens * width, image,
                                          head, 0, p.queries);
  }
  return failure;
}

// With more threads than heads: the slabs of one image, then its queries.
template <class A>
const char* forward_by_images(const Problem& p, const ForwardTensors& t,
                              const Lattice<A>& lattice) {
  using Real = typename A::Real;
  const int64_t width = row_channels<A>(p);
  const Arrays<Real> slabs(p.heads, (p.tokens + 1) * width);
  if (slabs.missing()) return no_memory();
  for (int64_t image = 0; image < p.batch; image++) {
    in_parallel(p.heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t head = first; head < last; head++)
        copy_slab<A>(p, t.value, image, head, 0, p.tokens, slabs[head]);
    });
    const char* failure = over_queries(p, [&](int64_t head, int64_t begin, int64_t end) {
      return forward_run<A, Real, false>(p, t, lattice, slabs[head], width, p.tokens * width, image,
                                         head, begin, end);
    });
    if (failure) return failure;
  }
  return nullptr;
}

template <class A>
const char* forward_by_slabs(const Problem& p, const ForwardTensors& t) {
  const int64_t width = row_channels<A>(p), slices = p.batch * p.heads;
  if ((p.tokens + 1) * width >= most_elements) return too_large();
  const Lattice<A> lattice(p, 0, p.levels, width);
  if (lattice.missing()) return no_memory();
  const int64_t threads = count_threads();
  if (slices % threads && slices < 4 * threads) return forward_by_images(p, t, lattice);
  return parts_in_parallel(slices, 1, [&](int64_t begin, int64_t end) {
    return forward_by_heads(p, t, lattice, begin, end);
  });
}

template <class T>
const char* forward_of(const Problem& p, const ForwardTensors& t) {
  using A = typename Arithmetic<T>::type;
  return rows_in_place<A>(p) ? forward_in_place<T>(p, t) : forward_by_slabs<A>(p, t);
}

const char* forward(const Problem& p, const ForwardTensors& t) {
  switch (p.value_type) {
    case Number::float64:
      return forward_of<double>(p, t);
    case Number::bfloat16:
      return forward_of<BFloat16>(p, t);
    case Number::float16:
      return forward_of<Half>(p, t);
    default:
      return forward_of<float>(p, t);
  }
}
