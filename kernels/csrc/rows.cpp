// The loops of rows.h for one instruction set, SAM2FAST_ISA; CMakeLists.txt compiles this file once for each.

#include "rows.h"

#include "simd.h"

namespace sam2fast::SAM2FAST_ISA {
namespace {

void blend(const float* a, const float* b, float weight, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = a[j] + weight * (b[j] - a[j]);
}

// kFactor 0 stands for the factor of the axis.
template <int kFactor>
SAM2FAST_INLINE void expand_by(const AxisView& axis, const float* padded, float* cells) {
  const int64_t factor = kFactor ? kFactor : axis.factor;
  for (int64_t c = 0; c <= axis.size; ++c) {
    const float sample = padded[c], step = padded[c + 1] - padded[c];
    for (int64_t k = 0; k < factor; ++k) cells[factor * c + k] = sample + axis.weights[k] * step;
  }
}

void expand(const AxisView& axis, const float* padded, float* cells) {
  switch (axis.factor) {
    case 1: return expand_by<1>(axis, padded, cells);
    case 2: return expand_by<2>(axis, padded, cells);
    case 4: return expand_by<4>(axis, padded, cells);
    case 8: return expand_by<8>(axis, padded, cells);
    default: return expand_by<0>(axis, padded, cells);
  }
}

template <int kFactor>
SAM2FAST_INLINE void reduce_by(const AxisView& axis, const float* cells, float* left, float* right) {
  const int64_t factor = kFactor ? kFactor : axis.factor;
  for (int64_t c = 0; c <= axis.size; ++c) {
    float sum = 0.0f, weighted = 0.0f;
    for (int64_t k = 0; k < factor; ++k) {
      sum += cells[factor * c + k];
      weighted += axis.weights[k] * cells[factor * c + k];
    }
    left[c] = sum - weighted;
    right[c] = weighted;
  }
}

void reduce(const AxisView& axis, const float* cells, float* left, float* right, float* out) {
  switch (axis.factor) {
    case 1: reduce_by<1>(axis, cells, left, right); break;
    case 2: reduce_by<2>(axis, cells, left, right); break;
    case 4: reduce_by<4>(axis, cells, left, right); break;
    case 8: reduce_by<8>(axis, cells, left, right); break;
    default: reduce_by<0>(axis, cells, left, right);
  }
  // Sample j is the right one of cell j - 1, at [j], and the left one of cell j, at [j + 1].
  for (int64_t j = 0; j < axis.size; ++j) out[j] = right[j] + left[j + 1];
  // The border cells belong to the border samples alone.
  out[0] += left[0];
  out[axis.size - 1] += right[axis.size];
}

// q^gamma for q = sigmoid(-z), whose logarithm is -softplus(z) = -(z + softplus(-z)). kGamma -1 stands for any gamma.
template <int kGamma>
SAM2FAST_INLINE Float focus(const Logistic& of, Float z, float gamma) {
  if constexpr (kGamma == 0) return broadcast(1.0f);
  if constexpr (kGamma == 1) return of.negative;
  if constexpr (kGamma == 2) return of.negative * of.negative;
  const Float softplus = z + of.softplus;
  return exp_negative(gamma * (softplus < 0.0f ? Float{} : softplus));
}

// Whether each pixel is in the target: -1 or 0.
SAM2FAST_INLINE Int inside_of(const uint8_t* target, int64_t count) {
  return __builtin_convertvector(load<Bytes>(target, count), Int) != 0;
}

template <int kGamma>
SAM2FAST_INLINE RowSums sum_by(
    const float* logits, const uint8_t* target, int64_t width, const FocalOptions& options) {
  const Float foreground = broadcast(options.foreground), background = broadcast(options.background);
  Float focal = {}, p = {}, p_inside = {};
  Int intersection = {}, mask = {}, pixels = {};
  const auto add = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float x = load<Float>(logits + i, count);
    const Int inside = inside_of(target + i, count);
    const Int valid = lanes_below(count);
    const Float z = inside ? x : -x;
    const Logistic of = logistic(z);
    const Float loss = (inside ? foreground : background) * of.softplus * focus<kGamma>(of, z, options.gamma);
    const Float probability = inside ? of.positive : of.negative;
    focal += valid ? loss : Float{};
    p += valid ? probability : Float{};
    p_inside += inside ? probability : Float{};
    // Masks are -1.
    intersection -= inside & (x > 0.0f);
    mask -= x > 0.0f;
    pixels -= inside;
  };
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) add(i, kLanes);
  if (i < width) add(i, width - i);
  return {total(focal), total(p), total(p_inside), total(intersection), total(mask), total(pixels)};
}

RowSums sum(const float* logits, const uint8_t* target, int64_t width, const FocalOptions& options) {
  if (options.gamma == 2.0f) return sum_by<2>(logits, target, width, options);
  if (options.gamma == 0.0f) return sum_by<0>(logits, target, width, options);
  if (options.gamma == 1.0f) return sum_by<1>(logits, target, width, options);
  return sum_by<-1>(logits, target, width, options);
}

template <int kGamma>
SAM2FAST_INLINE void differentiate_by(
    const float* logits, const uint8_t* target, int64_t width, const FocalOptions& options, const Slopes& slopes,
    float* out) {
  const Float foreground = broadcast(-slopes.focal * options.foreground);
  const Float background = broadcast(slopes.focal * options.background);
  const Float p_inside = broadcast(slopes.p + slopes.p_inside), p_outside = broadcast(slopes.p);
  const auto write = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float x = load<Float>(logits + i, count);
    const Int inside = inside_of(target + i, count);
    const Float z = inside ? x : -x;
    const Logistic of = logistic(z);
    Float slope = of.negative;
    if constexpr (kGamma != 0) slope += options.gamma * of.positive * of.softplus;
    const Float focal = (inside ? foreground : background) * focus<kGamma>(of, z, options.gamma) * slope;
    store(focal + (inside ? p_inside : p_outside) * (of.positive * of.negative), out + i, count);
  };
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) write(i, kLanes);
  if (i < width) write(i, width - i);
}

void differentiate(
    const float* logits, const uint8_t* target, int64_t width, const FocalOptions& options, const Slopes& slopes,
    float* out) {
  if (options.gamma == 2.0f) return differentiate_by<2>(logits, target, width, options, slopes, out);
  if (options.gamma == 0.0f) return differentiate_by<0>(logits, target, width, options, slopes, out);
  if (options.gamma == 1.0f) return differentiate_by<1>(logits, target, width, options, slopes, out);
  return differentiate_by<-1>(logits, target, width, options, slopes, out);
}

}  // namespace

extern const RowLoops kRowLoops;
const RowLoops kRowLoops = {blend, expand, reduce, sum, differentiate};

}  // namespace sam2fast::SAM2FAST_ISA
