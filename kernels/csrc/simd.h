// Vectors of float32 as wide as the instruction set of this translation unit, and the logistic function of them. Vector
// extensions of GCC and Clang, because automatic vectorization gives up on some of these loops.

#pragma once

#include <cstdint>
#include <cstring>

namespace sam2fast::SAM2FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Float __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

#define SAM2FAST_INLINE static inline __attribute__((always_inline))

// The first `count` lanes from memory, 0 in the others.
template <typename Vector, typename Element>
SAM2FAST_INLINE Vector load(const Element* source, int64_t count = kLanes) {
  Vector value = {};
  if (count >= kLanes) {
    std::memcpy(&value, source, sizeof(Vector));
  } else {
    std::memcpy(&value, source, static_cast<size_t>(count) * sizeof(Element));
  }
  return value;
}

template <typename Vector, typename Element>
SAM2FAST_INLINE void store(Vector value, Element* out, int64_t count) {
  if (count >= kLanes) {
    std::memcpy(out, &value, sizeof(Vector));
  } else {
    std::memcpy(out, &value, static_cast<size_t>(count) * sizeof(Element));
  }
}

SAM2FAST_INLINE Float broadcast(float value) { return value - Float{}; }

// -1 in lanes below `count`, else 0.
SAM2FAST_INLINE Int lanes_below(int64_t count) {
  Int lane = {};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count < kLanes ? count : kLanes);
}

SAM2FAST_INLINE Float absolute(Float x) { return reinterpret_cast<Float>(reinterpret_cast<Int>(x) & 0x7fffffff); }

SAM2FAST_INLINE float total(Float value) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

SAM2FAST_INLINE int32_t total(Int value) {
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

// exp(-u) for u >= 0, relative error below 2e-7; 0 for u > 87, where float32 would leave its normal range.
SAM2FAST_INLINE Float exp_negative(Float u) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
  const Int beyond = u > 87.0f;
  const Float clamped = beyond ? broadcast(87.0f) : u;  // keeps NaN
  const Float shifted = clamped * -1.44269504f + kRound;
  const Float n = shifted - kRound;
  // ln 2 in two parts, so that the remainder keeps all bits.
  Float r = -clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Float value = r * 0.00138368445f + 0.0083748158f;
  value = value * r + 0.0416682256f;
  value = value * r + 0.166664202f;
  value = value * r + 0.499999921f;
  value = value * r + 1.0f;
  value = value * r + 1.0f;
  const Int exponent = reinterpret_cast<Int>(shifted) - (0x4b400000 - 127);  // the bits of kRound
  value = value * reinterpret_cast<Float>(exponent << 23);
  return beyond ? Float{} : value;
}

// What the losses need of logits z: with e = exp(-|z|), sigmoid(z) and sigmoid(-z) without cancellation, and
// softplus(-z) = -log sigmoid(z) = max(-z, 0) + log(1 + e).
struct Logistic {
  Float positive;  // sigmoid(z)
  Float negative;  // sigmoid(-z)
  Float softplus;  // softplus(-z)
  Float opposite;  // softplus(z), not from the former, where small values would cancel
};

SAM2FAST_INLINE Logistic logistic(Float z) {
  const Float magnitude = absolute(z);
  const Float e = exp_negative(magnitude);
  // One division serves 1 / (1 + e) and 1 / (2 + e).
  const Float inverse = 1.0f / ((1.0f + e) * (2.0f + e));
  const Float larger = inverse * (2.0f + e);
  const Float smaller = e * larger;
  // log(1 + e) = 2 atanh(s), s = e / (2 + e) <= 1 / 3: an odd polynomial, exact to 4e-9, also for the smallest e.
  const Float s = e * inverse * (1.0f + e);
  const Float s2 = s * s;
  Float log1p = s2 * 0.281783319f + 0.279606034f;
  log1p = log1p * s2 + 0.400249102f;
  log1p = log1p * s2 + 0.666663147f;
  log1p = log1p * s2 + 2.0f;
  log1p = log1p * s;
  const Int below = z < 0.0f;
  return {
      below ? smaller : larger, below ? larger : smaller, (below ? magnitude : Float{}) + log1p,
      (below ? Float{} : magnitude) + log1p};
}

SAM2FAST_INLINE Float sigmoid(Float x) {
  const Float e = exp_negative(absolute(x));
  const Float larger = 1.0f / (1.0f + e);
  return x < 0.0f ? e * larger : larger;
}

// Its derivative sigmoid(x) sigmoid(-x).
SAM2FAST_INLINE Float sigmoid_slope(Float x) {
  const Float e = exp_negative(absolute(x));
  const Float larger = 1.0f / (1.0f + e);
  return e * larger * larger;
}

}  // namespace sam2fast::SAM2FAST_ISA
