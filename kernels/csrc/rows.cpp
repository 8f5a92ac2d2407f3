// The loops of rows.h for one instruction set, SAM2FAST_ISA; CMakeLists.txt compiles this file once for each.

#include "rows.h"

#include "formats.h"
#include "simd.h"

namespace sam2fast::SAM2FAST_ISA {
namespace {

// body(first, count) for every vector of a row.
template <typename Body>
SAM2FAST_INLINE void for_each_vector(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
  if (i < width) body(i, width - i);
}

template <Format kFormat>
SAM2FAST_INLINE void load_half(const uint16_t* source, int64_t stride, int64_t count, float* out) {
  for_each_vector(count, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    Halves halves = {};
    if (stride == 1) {
      halves = load<Halves>(source + i, lanes);
    } else {
      for (int64_t k = 0; k < lanes; ++k) halves[k] = source[(i + k) * stride];
    }
    store(widen<kFormat>(halves), out + i, lanes);
  });
}

void load_row(const void* source, Format format, int64_t stride, int64_t count, float* out) {
  const auto* halves = static_cast<const uint16_t*>(source);
  if (format == Format::bfloat16) return load_half<Format::bfloat16>(halves, stride, count, out);
  if (format == Format::float16) return load_half<Format::float16>(halves, stride, count, out);
  const auto* floats = static_cast<const float*>(source);
  if (stride == 1) {
    std::memcpy(out, floats, static_cast<size_t>(count) * sizeof(float));
  } else {
    for (int64_t j = 0; j < count; ++j) out[j] = floats[j * stride];
  }
}

template <Activation kActivation, Format kFormat>
SAM2FAST_INLINE void respond_by(const float* logits, int64_t width, const Response& response, void* out) {
  const Float scale = broadcast(response.scale), bias = broadcast(response.bias), one = broadcast(1.0f);
  auto* elements = static_cast<typename Element<kFormat>::type*>(out);
  for_each_vector(width, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    Float value = load<Float>(logits + i, count);
    if constexpr (kActivation == Activation::sigmoid) value = sigmoid(value);
    if constexpr (kActivation == Activation::binary) value = value > 0.0f ? one : Float{};
    store_as<kFormat>(value * scale + bias, elements + i, count);
  });
}

template <Activation kActivation>
SAM2FAST_INLINE void respond_as(
    const float* logits, int64_t width, const Response& response, Format format, void* out) {
  switch (format) {
    case Format::float32: return respond_by<kActivation, Format::float32>(logits, width, response, out);
    case Format::bfloat16: return respond_by<kActivation, Format::bfloat16>(logits, width, response, out);
    case Format::float16: return respond_by<kActivation, Format::float16>(logits, width, response, out);
  }
}

void respond(const float* logits, int64_t width, const Response& response, Format format, void* out) {
  switch (response.activation) {
    case Activation::none: return respond_as<Activation::none>(logits, width, response, format, out);
    case Activation::sigmoid: return respond_as<Activation::sigmoid>(logits, width, response, format, out);
    case Activation::binary: return respond_as<Activation::binary>(logits, width, response, format, out);
  }
}

void store_row(const float* row, int64_t count, Format format, void* out) {
  // Adding -0 keeps the sign of a zero.
  respond_as<Activation::none>(row, count, {Activation::none, 1.0f, -0.0f}, format, out);
}

void trace_back(const float* gradient, const float* logits, int64_t width, const Response& response, float* out) {
  const Float scale = broadcast(response.scale);
  for_each_vector(width, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    Float slope = scale;
    if (response.activation == Activation::sigmoid) slope *= sigmoid_slope(load<Float>(logits + i, count));
    store(load<Float>(gradient + i, count) * slope, out + i, count);
  });
}

void blend(const float* a, const float* b, float weight, int64_t count, float* out) {
  if (weight > 0.5f) return blend(b, a, 1.0f - weight, count, out);
  for (int64_t j = 0; j < count; ++j) out[j] = a[j] + weight * (b[j] - a[j]);
}

// kFactor 0 stands for the factor of the axis.
template <int kFactor>
SAM2FAST_INLINE void expand_by(const AxisView& axis, const float* padded, float* cells) {
  const int64_t factor = kFactor ? kFactor : axis.factor;
  const int64_t nearer = (factor + 1) / 2;  // indices before it have weights of at most 1/2
  for (int64_t c = 0; c <= axis.size; ++c) {
    const float sample = padded[c], next = padded[c + 1], step = next - sample;
    for (int64_t k = 0; k < nearer; ++k) cells[factor * c + k] = sample + axis.weights[k] * step;
    for (int64_t k = nearer; k < factor; ++k) cells[factor * c + k] = next - (1.0f - axis.weights[k]) * step;
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
  if constexpr (kFactor == 1) {
    // Every element is a sample: 0 times NaN must not reach its neighbor.
    for (int64_t c = 0; c <= axis.size; ++c) left[c] = cells[c], right[c] = 0.0f;
    return;
  }
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

// q^gamma for q = sigmoid(-z), whose logarithm is -softplus(z). kGamma -1 stands for any gamma.
template <int kGamma>
SAM2FAST_INLINE Float focus(const Logistic& of, float gamma) {
  if constexpr (kGamma == 0) return broadcast(1.0f);
  if constexpr (kGamma == 1) return of.negative;
  if constexpr (kGamma == 2) return of.negative * of.negative;
  return exp_negative(gamma * of.opposite);
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
  for_each_vector(width, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float x = load<Float>(logits + i, count);
    const Int inside = inside_of(target + i, count);
    const Int valid = lanes_below(count);
    const Float z = inside ? x : -x;
    const Logistic of = logistic(z);
    const Float loss = (inside ? foreground : background) * of.softplus * focus<kGamma>(of, options.gamma);
    const Float probability = inside ? of.positive : of.negative;
    focal += valid ? loss : Float{};
    p += valid ? probability : Float{};
    p_inside += inside ? probability : Float{};
    // Masks are -1.
    intersection -= inside & (x > 0.0f);
    mask -= x > 0.0f;
    pixels -= inside;
  });
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
  for_each_vector(width, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float x = load<Float>(logits + i, count);
    const Int inside = inside_of(target + i, count);
    const Float z = inside ? x : -x;
    const Logistic of = logistic(z);
    Float slope = of.negative;
    if constexpr (kGamma != 0) slope += options.gamma * of.positive * of.softplus;
    const Float focal = (inside ? foreground : background) * focus<kGamma>(of, options.gamma) * slope;
    store(focal + (inside ? p_inside : p_outside) * (of.positive * of.negative), out + i, count);
  });
}

void differentiate(
    const float* logits, const uint8_t* target, int64_t width, const FocalOptions& options, const Slopes& slopes,
    float* out) {
  if (options.gamma == 2.0f) return differentiate_by<2>(logits, target, width, options, slopes, out);
  if (options.gamma == 0.0f) return differentiate_by<0>(logits, target, width, options, slopes, out);
  if (options.gamma == 1.0f) return differentiate_by<1>(logits, target, width, options, slopes, out);
  return differentiate_by<-1>(logits, target, width, options, slopes, out);
}

RowCounts count(const float* logits, const uint8_t* target, int64_t width) {
  Int wrong = {}, background = {};
  for_each_vector(width, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Int inside = inside_of(target + i, count);
    // Masks are -1; lanes behind the row look like background that is right.
    wrong -= inside ^ (load<Float>(logits + i, count) > 0.0f);
    background -= ~inside & lanes_below(count);
  });
  return {total(wrong), total(background)};
}

// Depth of a pixel of `kind` 1 (missed), -1 (false) or 0 next to one of depth `neighbor`.
SAM2FAST_INLINE Int deepen(Int kind, Int neighbor) {
  const Int same = ((kind > 0) & (neighbor > 0)) | ((kind < 0) & (neighbor < 0));
  return kind + (same & neighbor);
}

void depth_from_above(
    const float* logits, const uint8_t* target, int64_t width, const int32_t* above, int32_t* out) {
  for_each_vector(width, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Int inside = inside_of(target + i, count);
    const Int predicted = load<Float>(logits + i, count) > 0.0f;
    store(deepen(predicted - inside, load<Int>(above + i, count)), out + i, count);
  });
}

void depth_from_below(const int32_t* below, int64_t width, int32_t* depth) {
  for_each_vector(width, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Int value = load<Int>(depth + i, count);
    const Int kind = (value < 0) - (value > 0);
    const Int other = deepen(kind, load<Int>(below + i, count));
    store(value * kind > other * kind ? other : value, depth + i, count);
  });
}

}  // namespace

extern const RowLoops kRowLoops;
const RowLoops kRowLoops = {
    load_row, store_row,  blend,      expand, reduce,           sum,
    differentiate, respond, trace_back, count,  depth_from_above, depth_from_below};

}  // namespace sam2fast::SAM2FAST_ISA
