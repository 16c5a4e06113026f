// Vectors of the instruction set's width by the compiler's vector extensions: no intrinsics, so the
// same text serves x86-64, AVX2, AVX-512 and ARM. QUERYPATCH_VECTOR_BYTES must be the native width:
// 64-byte vectors on AVX2 run 13 times slower (measured, gcc 12).

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr int vector_bytes = QUERYPATCH_VECTOR_BYTES;

// What arithmetic is done in: `Real` numbers and integers of the same size, `width` to a vector.
struct Single {
  using Real = float;
  using Integer = int32_t;
  static constexpr int width = vector_bytes / 4;
  typedef float Vector __attribute__((vector_size(vector_bytes)));
  typedef int32_t Integers __attribute__((vector_size(vector_bytes)));
};
struct Double {
  using Real = double;
  using Integer = int64_t;
  static constexpr int width = vector_bytes / 8;
  typedef double Vector __attribute__((vector_size(vector_bytes)));
  typedef int64_t Integers __attribute__((vector_size(vector_bytes)));
};

using Singles = Single::Vector;
using Doubles = Double::Vector;
typedef uint32_t Words __attribute__((vector_size(vector_bytes)));
typedef uint16_t Shorts __attribute__((vector_size(vector_bytes / 2)));

#define QUERYPATCH_INLINE inline __attribute__((always_inline))
#define QUERYPATCH_INLINE_LAMBDA __attribute__((always_inline))
// One copy for all that call it: what runs once a query need not be compiled forty times.
#define QUERYPATCH_SHARED __attribute__((noinline))

#if defined(__clang__) || __GNUC__ >= 12
#define QUERYPATCH_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define QUERYPATCH_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename A::Integers{__VA_ARGS__})
#endif

// Lane numbers 0 ... width - 1 as a pack.
template <int... K>
struct Lanes {};
template <int N, int... K>
struct LanesUpTo : LanesUpTo<N - 1, N - 1, K...> {};
template <int... K>
struct LanesUpTo<0, K...> {
  using type = Lanes<K...>;
};
template <class A>
using AllLanes = typename LanesUpTo<A::width>::type;

template <class A>
QUERYPATCH_INLINE typename A::Vector all(typename A::Real number) {
  return number - typename A::Vector{};
}

// mask ? a : b, lane by lane; comparisons give masks of ones.
QUERYPATCH_INLINE Single::Integers choose(Single::Integers mask, Single::Integers a,
                                          Single::Integers b) {
  return (mask & a) | (~mask & b);
}
QUERYPATCH_INLINE Double::Integers choose(Double::Integers mask, Double::Integers a,
                                          Double::Integers b) {
  return (mask & a) | (~mask & b);
}
QUERYPATCH_INLINE Singles choose(Single::Integers mask, Singles a, Singles b) {
  return (Singles)choose(mask, (Single::Integers)a, (Single::Integers)b);
}
QUERYPATCH_INLINE Doubles choose(Double::Integers mask, Doubles a, Doubles b) {
  return (Doubles)choose(mask, (Double::Integers)a, (Double::Integers)b);
}

QUERYPATCH_INLINE Singles load(const float* from) {
  Singles v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
QUERYPATCH_INLINE Doubles load(const double* from) {
  Doubles v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
QUERYPATCH_INLINE Single::Integers load(const int32_t* from) {
  Single::Integers v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
QUERYPATCH_INLINE Double::Integers load(const int64_t* from) {
  Double::Integers v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
QUERYPATCH_INLINE Words load_words(const uint16_t* from) {
  Shorts v;
  __builtin_memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Words);
}
QUERYPATCH_INLINE Singles load(const BFloat16* from) {
  return (Singles)(load_words(&from->bits) << 16);
}
QUERYPATCH_INLINE Singles load(const Half* from) {
  const Words word = load_words(&from->bits);
  const Words magnitude = (word & 0x7fff) << 13;
  // The product moves the exponent, and makes numbers of half's subnormals.
  const Words scaled = (Words)((Singles)magnitude * 0x1p112f);
  const Words special = (Words)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (Singles)(scaled | special | ((word & 0x8000) << 16));
}

QUERYPATCH_INLINE void store(float* to, Singles v) { __builtin_memcpy(to, &v, sizeof v); }
QUERYPATCH_INLINE void store(double* to, Doubles v) { __builtin_memcpy(to, &v, sizeof v); }
QUERYPATCH_INLINE void store(int32_t* to, Single::Integers v) {
  __builtin_memcpy(to, &v, sizeof v);
}
QUERYPATCH_INLINE void store(int64_t* to, Double::Integers v) {
  __builtin_memcpy(to, &v, sizeof v);
}
QUERYPATCH_INLINE void store_words(uint16_t* to, Words words) {
  const Shorts v = __builtin_convertvector(words, Shorts);
  __builtin_memcpy(to, &v, sizeof v);
}
// To the nearest, ties to even, as torch rounds.
QUERYPATCH_INLINE void store(BFloat16* to, Singles v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words not_a_number = (Words)(v != v);
  store_words(&to->bits, (not_a_number & 0x7fc0) | (~not_a_number & rounded));
}
QUERYPATCH_INLINE void store(Half* to, Singles v) {
  const Words sign = (Words)v & 0x80000000u;
  const Words bits = (Words)v ^ sign;
  const Words normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  // Adding 0.5 lets the adder round a subnormal to half's last place.
  const Words subnormal = (Words)((Singles)bits + 0.5f) - 0x3f000000u;
  const Words not_a_number = (Words)(bits > 0x7f800000u);
  const Words infinite = 0x7c00u | (not_a_number & 0x0200u);
  const Words small = (Words)(bits < (113u << 23));
  const Words large = (Words)(bits >= (143u << 23));
  const Words finite = (small & subnormal) | (~small & normal);
  store_words(&to->bits, (large & infinite) | (~large & finite) | (sign >> 16));
}

QUERYPATCH_INLINE Single::Integers truncated(Singles v) {
  return __builtin_convertvector(v, Single::Integers);
}
QUERYPATCH_INLINE Double::Integers truncated(Doubles v) {
  return __builtin_convertvector(v, Double::Integers);
}
QUERYPATCH_INLINE Singles real(Single::Integers v) { return __builtin_convertvector(v, Singles); }
QUERYPATCH_INLINE Doubles real(Double::Integers v) { return __builtin_convertvector(v, Doubles); }

// The integer below, for numbers that an integer holds. True is -1 in a lane.
template <class A>
QUERYPATCH_INLINE typename A::Integers floored(typename A::Vector v) {
  const typename A::Integers toward_zero = truncated(v);
  return toward_zero + (typename A::Integers)(real(toward_zero) > v);
}

// Lanes 0, 2, 4, ... of a and b one after the other (or 1, 3, 5, ...), and the reverse.
template <class A, int... K>
QUERYPATCH_INLINE typename A::Vector every_second(typename A::Vector a, typename A::Vector b,
                                                  Lanes<K...>) {
  return QUERYPATCH_SHUFFLE(a, b, (2 * K)...);
}
template <class A, int... K>
QUERYPATCH_INLINE typename A::Vector every_other(typename A::Vector a, typename A::Vector b,
                                                 Lanes<K...>) {
  return QUERYPATCH_SHUFFLE(a, b, (2 * K + 1)...);
}
template <class A, int First, int... K>
QUERYPATCH_INLINE typename A::Vector zipped(typename A::Vector a, typename A::Vector b,
                                            Lanes<K...>) {
  return QUERYPATCH_SHUFFLE(a, b, (First + K / 2 + (K % 2) * A::width)...);
}

template <class A, int Distance, int... K>
QUERYPATCH_INLINE typename A::Vector exchanged(typename A::Vector a, Lanes<K...>) {
  return QUERYPATCH_SHUFFLE(a, a, (K ^ Distance)...);
}
template <class A, int Distance = A::width / 2>
QUERYPATCH_INLINE typename A::Real lane_sum(typename A::Vector a) {
  if constexpr (Distance == 0) {
    return a[0];
  } else {
    return lane_sum<A, Distance / 2>(a + exchanged<A, Distance>(a, AllLanes<A>{}));
  }
}
template <class A, int Distance = A::width / 2>
QUERYPATCH_INLINE typename A::Real lane_max(typename A::Vector a) {
  if constexpr (Distance == 0) {
    return a[0];
  } else {
    const typename A::Vector b = exchanged<A, Distance>(a, AllLanes<A>{});
    return lane_max<A, Distance / 2>(choose((typename A::Integers)(a > b), a, b));
  }
}

// e to the v for v <= 0; NaN stays NaN, what float32 cannot hold becomes 0 (Cody-Waite reduction).
QUERYPATCH_INLINE Singles exponential(Singles v) {
  const Single::Integers tiny = v < -87.0f;
  const Singles x = choose(tiny, all<Single>(-87.0f), v);
  const Single::Integers power = floored<Single>(
      choose((Single::Integers)(x == x), x, Singles{}) * 1.44269504f + 0.5f);
  const Singles n = real(power);
  const Singles f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Singles p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  const Singles fraction = (f * f) * p + (f + 1.0f);
  const Singles scale = (Singles)((power + 127) << 23);
  return choose(tiny, Singles{}, fraction * scale);
}
QUERYPATCH_INLINE Doubles exponential(Doubles v) {
  Doubles e = {};
  for (int lane = 0; lane < Double::width; lane++) e[lane] = __builtin_exp(v[lane]);
  return e;
}
