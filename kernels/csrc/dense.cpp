// The loops of dense.h for one instruction set, SAM2FAST_ISA; CMakeLists.txt compiles this file once for each.

#include "dense.h"

#include <cmath>

#include "formats.h"
#include "simd.h"

namespace sam2fast::SAM2FAST_ISA {
namespace {

SAM2FAST_INLINE Bits mix(Bits x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

SAM2FAST_INLINE Bits columns_from(int64_t first) {
  Bits column = {};
  for (int i = 0; i < kLanes; ++i) column[i] = static_cast<uint32_t>(i);
  return column + static_cast<uint32_t>(first);
}

// The factor of elements `first` on: `scale` where they are kept, else 0.
SAM2FAST_INLINE Float factors(const Dropout& dropout, int64_t first) {
  const Bits random = mix(dropout.key + columns_from(first) * 0x9e3779b9u);
  return random >= dropout.threshold ? broadcast(dropout.scale) : Float{};
}

SAM2FAST_INLINE Float larger(Float a, Float b) { return (a > b) | (a != a) ? a : b; }

float largest(const float* row, int64_t count) {
  Float best = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) best = larger(load<Float>(row + i), best);
  float top = -INFINITY;
  for (int lane = 0; lane < kLanes; ++lane) top = best[lane] > top || best[lane] != best[lane] ? best[lane] : top;
  for (; i < count; ++i) top = row[i] > top || row[i] != row[i] ? row[i] : top;
  return top;
}

template <bool kDrops>
WeightSums weigh_as(float* scores, int64_t count, const Dropout& dropout) {
  const float top = largest(scores, count);
  Float sum = {}, kept = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = count - i;
    const Float e = exp_negative(top - load<Float>(scores + i, lanes));
    const Float inside = lanes_below(lanes) ? e : Float{};
    sum += inside;
    if constexpr (kDrops) {
      const Float dropped = inside * factors(dropout, i);
      kept += dropped;
      store(dropped, scores + i, lanes);
    } else {
      store(inside, scores + i, lanes);
    }
  }
  const float whole = total(sum), inverse = 1.0f / whole;
  for (int64_t i = 0; i < count; ++i) scores[i] *= inverse;
  return {top + std::log(whole), kDrops ? total(kept) * inverse : 1.0f};
}

WeightSums weigh(float* scores, int64_t count, const Dropout& dropout) {
  return dropout.threshold ? weigh_as<true>(scores, count, dropout) : weigh_as<false>(scores, count, dropout);
}

template <bool kDrops>
void slope_as(float* scores, float* slopes, int64_t count, float lse, float delta, float row, const Dropout& dropout) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = count - i;
    const Float p = exp_negative(lse - load<Float>(scores + i, lanes));
    const Float slope = load<Float>(slopes + i, lanes) + row;
    if constexpr (kDrops) {
      const Float factor = factors(dropout, i);
      store(p * factor, scores + i, lanes);
      store(p * (factor * slope - delta), slopes + i, lanes);
    } else {
      store(p, scores + i, lanes);
      store(p * (slope - delta), slopes + i, lanes);
    }
  }
}

void slope(float* scores, float* slopes, int64_t count, float lse, float delta, float row, const Dropout& dropout) {
  const auto run = dropout.threshold ? slope_as<true> : slope_as<false>;
  run(scores, slopes, count, lse, delta, row, dropout);
}

void rotate(const float* x, const float* cos, const float* sin, int64_t pairs, float scale, float* out) {
  for (int64_t c = 0; c < pairs; ++c) {
    const float a = x[2 * c], b = x[2 * c + 1];
    out[2 * c] = scale * (a * cos[c] - b * sin[c]);
    out[2 * c + 1] = scale * (a * sin[c] + b * cos[c]);
  }
}

void rectify(const float* x, int64_t count, const Dropout& dropout, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float value = load<Float>(x + i, count - i);
    const Float positive = value < 0.0f ? Float{} : value;
    store(positive * factors(dropout, i), out + i, count - i);
  }
}

void rectified_slope(const float* gradient, const float* result, int64_t count, float scale, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float slope = load<Float>(gradient + i, count - i) * scale;
    store(load<Float>(result + i, count - i) > 0.0f ? slope : Float{}, out + i, count - i);
  }
}

void drop(const float* x, int64_t count, const Dropout& dropout, float* out) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(load<Float>(x + i, count - i) * factors(dropout, i), out + i, count - i);
}

}  // namespace

extern const DenseLoops kDenseLoops;
const DenseLoops kDenseLoops = {weigh, slope, rotate, rectify, rectified_slope, drop};

}  // namespace sam2fast::SAM2FAST_ISA
