// Sums over the lanes of several vectors at once, by halving: two shuffles and an addition a vector.

// Two neighbours of each block of four lanes of a and b, taken in turn: a0 b0 a1 b1 (or 2 and 3).
template <class A, int First, int... K>
QUERYPATCH_INLINE typename A::Vector unpacked(typename A::Vector a, typename A::Vector b,
                                              Lanes<K...>) {
  return QUERYPATCH_SHUFFLE(a, b, (K / 4 * 4 + First + K % 4 / 2 + (K % 2) * A::width)...);
}
template <class A>
QUERYPATCH_INLINE typename A::Vector folded(typename A::Vector a, typename A::Vector b) {
  return unpacked<A, 0>(a, b, AllLanes<A>{}) + unpacked<A, 2>(a, b, AllLanes<A>{});
}

// Blocks of four lanes of a and b taken in turn: A0 B0 A1 B1 (from First / 4 on).
template <class A, int First, int... K>
QUERYPATCH_INLINE typename A::Vector blocks(typename A::Vector a, typename A::Vector b,
                                            Lanes<K...>) {
  return QUERYPATCH_SHUFFLE(a, b, (First + K / 8 * 4 + K % 4 + (K / 4 % 2) * A::width)...);
}
template <class A>
QUERYPATCH_INLINE typename A::Vector blocks_folded(typename A::Vector a, typename A::Vector b) {
  constexpr int half = A::width / 2;
  return blocks<A, 0>(a, b, AllLanes<A>{}) + blocks<A, half>(a, b, AllLanes<A>{});
}
template <class A, int First, int... K>
QUERYPATCH_INLINE typename A::Vector halves(typename A::Vector a, typename A::Vector b,
                                            Lanes<K...>) {
  constexpr int half = A::width / 2;
  return QUERYPATCH_SHUFFLE(a, b, (First + K % half + (K / half) * A::width)...);
}

// Lane i of the result is the sum of terms[i]; as many terms as lanes.
template <class A>
QUERYPATCH_INLINE typename A::Vector sums_of_fours(const typename A::Vector* terms) {
  typename A::Vector quads[A::width / 4];
  for (int i = 0; i < A::width / 4; i++) {
    const typename A::Vector* t = terms + 4 * i;
    quads[i] = folded<A>(folded<A>(t[0], t[2]), folded<A>(t[1], t[3]));
  }
  if constexpr (A::width == 4) {
    return quads[0];
  } else if constexpr (A::width == 8) {
    return blocks_folded<A>(quads[0], quads[1]);
  } else {
    const typename A::Vector u = blocks_folded<A>(quads[0], quads[1]);
    const typename A::Vector v = blocks_folded<A>(quads[2], quads[3]);
    constexpr int half = A::width / 2;
    return halves<A, 0>(u, v, AllLanes<A>{}) + halves<A, half>(u, v, AllLanes<A>{});
  }
}

// How many samples' corner products are summed together: one vector of single precision.
template <class A>
constexpr int together = A::width / 4;
template <>
constexpr int together<Double> = 1;

// Adds the sum of each of 4 * together vectors to `to`.
QUERYPATCH_INLINE void add_sums(const Singles* terms, float* to) {
  store(to, load(to) + sums_of_fours<Single>(terms));
}
QUERYPATCH_INLINE void add_sums(const Doubles* terms, double* to) {
  for (int i = 0; i < 4; i++) to[i] += lane_sum<Double>(terms[i]);
}
