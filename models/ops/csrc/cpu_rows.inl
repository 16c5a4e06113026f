// Rows of channels: where they lie, and copies of one head's rows side by side ("slabs").
//
// In (tokens, heads, channels) the rows of one head are a power of two apart, so that they share an
// eighth of the cache; side by side the gather is twice as fast, and the copy pays for itself as
// soon as a token is sampled more than about once. A slab ends with a row of zeros, where corners
// outside a level point.

constexpr int64_t most_elements = int64_t{1} << 29;  // of a slab: offsets are 32 bits wide

// Channels of a slab's row: full vectors.
template <class A>
QUERYPATCH_INLINE int64_t row_channels(const Problem& p) {
  return padded(p.channels, A::width);
}

// Whether rows are read where they lie: there are few samples, and whole vectors in a row.
template <class A>
QUERYPATCH_INLINE bool rows_in_place(const Problem& p) {
  const int64_t stride = p.heads * p.channels;
  return p.channels % A::width == 0 && p.tokens * stride < most_elements &&
         p.queries * p.levels * p.points < p.tokens;
}

inline const char* too_large() {
  return "value is too large: one head has more than 2^29 numbers (tokens x channels)";
}
inline const char* no_memory() { return "out of memory"; }

// Keeps gcc from adding the parts of an address again for each vector of a row.
template <class T>
QUERYPATCH_INLINE T* in_register(T* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

template <class A>
QUERYPATCH_INLINE void set_zero(typename A::Real* to, int64_t count) {
  __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(*to));
}

// Rows that lie `stride` apart from element `first` on, into rows side by side, `width` apart.
template <class T, class Real>
QUERYPATCH_INLINE void copy_rows_as(const T* from, int64_t first, int64_t stride, int64_t rows,
                                    int64_t channels, Real* to, int64_t width) {
  constexpr int64_t ahead = 16;
  for (int64_t row = 0; row < rows; row++) {
    const T* const next = from + first + row * stride;
    for (int64_t byte = 0; byte < channels * int64_t{sizeof(T)}; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(next + ahead * stride) + byte);
    read_as(next, channels, to + row * width);
  }
}
QUERYPATCH_SHARED void copy_rows(Number type, const void* from, int64_t first, int64_t stride,
                                 int64_t rows, int64_t channels, float* to, int64_t width) {
  if (type == Number::bfloat16)
    copy_rows_as(static_cast<const BFloat16*>(from), first, stride, rows, channels, to, width);
  else if (type == Number::float16)
    copy_rows_as(static_cast<const Half*>(from), first, stride, rows, channels, to, width);
  else
    copy_rows_as(static_cast<const float*>(from), first, stride, rows, channels, to, width);
}
QUERYPATCH_SHARED void copy_rows(Number, const void* from, int64_t first, int64_t stride,
                                 int64_t rows, int64_t channels, double* to, int64_t width) {
  copy_rows_as(static_cast<const double*>(from), first, stride, rows, channels, to, width);
}

// `tokens` rows of one image and head from `first_token` on, and the row of zeros.
template <class A>
QUERYPATCH_SHARED void copy_slab(const Problem& p, const void* value, int64_t image, int64_t head,
                                 int64_t first_token, int64_t tokens, typename A::Real* slab) {
  const int64_t width = row_channels<A>(p), stride = p.heads * p.channels;
  const int64_t first = (image * p.tokens + first_token) * stride + head * p.channels;
  copy_rows(p.value_type, value, first, stride, tokens, p.channels, slab, width);
  set_zero<A>(slab + tokens * width, width);
}

template <class A>
QUERYPATCH_SHARED void write_slab(const Problem& p, void* value, int64_t image, int64_t head,
                                  int64_t first_token, int64_t tokens,
                                  const typename A::Real* slab) {
  const int64_t width = row_channels<A>(p), stride = p.heads * p.channels;
  const int64_t first = (image * p.tokens + first_token) * stride + head * p.channels;
  for (int64_t t = 0; t < tokens; t++)
    write(p.value_type, value, first + t * stride, p.channels, slab + t * width);
}

// Calls `part` with 8, 4, 2 and 1 vectors at once, from the most on: part(Vectors<4>{}), ...
template <int N>
struct Vectors {
  static constexpr int count = N;
};
template <int N, class Part>
QUERYPATCH_INLINE void for_vectors(const Part& part) {
  part(Vectors<N>{});
  if constexpr (N > 1) for_vectors<N / 2>(part);
}
// As many as registers hold sums of; double precision is for checks, not for speed.
template <class A>
constexpr int most_vectors = vector_bytes == 64 ? 4 : 8;
template <>
constexpr int most_vectors<Double> = 1;

// body(begin, end) on torch's threads.
template <class Body>
void in_parallel(int64_t count, int64_t grain, const Body& body) {
  run_parallel(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

// part(begin, end) on torch's threads; the text of a failure, if there was one.
template <class Part>
const char* parts_in_parallel(int64_t count, int64_t grain, const Part& part) {
  const char* failure = nullptr;
  in_parallel(count, grain, [&](int64_t begin, int64_t end) {
    const char* failed = part(begin, end);
    if (failed) __atomic_store_n(&failure, failed, __ATOMIC_RELAXED);
  });
  return failure;
}
