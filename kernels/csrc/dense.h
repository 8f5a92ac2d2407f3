// Loops over rows of attention weights and activations, compiled for several instruction sets (dense.cpp); as rows.h.

#pragma once

#include <cstdint>

#include "rows.h"

namespace sam2fast {

// Which elements of a row dropout keeps: the formula of kernels/dropout/hash.py. Threshold 0 keeps all.
struct Dropout {
  uint32_t key, threshold;
  float scale;  // 1 / (1 - probability), of what is kept
};

// Of a row of attention: logarithm of the sum of exponentials, and sum of the dropped weights.
struct WeightSums {
  float lse, dropped;
};

struct DenseLoops {
  // Scores to dropped weights, in place.
  WeightSums (*weigh)(float* scores, int64_t count, const Dropout& dropout);
  // Scores to dropped weights, and gradients of these to gradients of the scores, in place: with p the weight and f its
  // dropout factor, s -> f p and g -> p (f (g + row) - delta).
  void (*slope)(
      float* scores, float* slopes, int64_t count, float lse, float delta, float row, const Dropout& dropout);
  // Pairs (a, b) to scale * (a cos - b sin, a sin + b cos).
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t pairs, float scale, float* out);
  // relu(x) with dropout.
  void (*rectify)(const float* x, int64_t count, const Dropout& dropout, float* out);
  // Gradient of relu(x) with dropout: `scale` times the gradient where its result is positive, else 0.
  void (*rectified_slope)(const float* gradient, const float* result, int64_t count, float scale, float* out);
  // x with dropout.
  void (*drop)(const float* x, int64_t count, const Dropout& dropout, float* out);
};

// The loops for this processor.
const DenseLoops& dense_loops();

}  // namespace sam2fast
