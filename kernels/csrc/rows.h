// Loops over one row of pixels, compiled for several instruction sets (rows.cpp) and chosen when first used. Plain
// pointers only: a standard-library function compiled here with wide instructions must not reach the rest of the library.

#pragma once

#include <cstdint>

namespace sam2fast {

// One axis of bilinear upsampling (align_corners = False) by a whole factor s.
//
// Full-resolution index X lies at (X + 1/2) / s - 1/2 in units of low-resolution samples. Between two samples c and c + 1
// ("cell" c) lie the s indices s c + floor(s / 2) + k, k = 0 ... s - 1, with the weight (2 k + [s even]) / (2 s) of sample
// c + 1. Cells -1 and size - 1 lie half outside: there both samples are the border sample. A padded row repeats its
// border samples, so that all size + 1 cells are alike.
struct AxisView {
  int64_t size, factor;
  const float* weights;  // of the s indices of a cell
};

// Focal loss: exponent and class weights.
struct FocalOptions {
  float gamma, foreground, background;
};

// Over pixels: focal loss, probability p, p inside the target; pixels of the intersection, the mask and the target.
struct RowSums {
  float focal, p, p_inside;
  int32_t intersection, mask, target;
};

// Gradients of the float sums of a mask.
struct Slopes {
  float focal, p, p_inside;
};

struct RowLoops {
  // out = a + weight * (b - a), exact where a equals b.
  void (*blend)(const float* a, const float* b, float weight, int64_t count, float* out);
  // A padded row [size + 2] to the full-resolution cells [(size + 1) * factor].
  void (*expand)(const AxisView& axis, const float* padded, float* cells);
  // The transpose, to [size]; elements of `cells` outside the image are 0. `left`, `right` are scratch [size + 1].
  void (*reduce)(const AxisView& axis, const float* cells, float* left, float* right, float* out);
  // `target` bytes are 0 in the background.
  RowSums (*sum)(const float* logits, const uint8_t* target, int64_t width, const FocalOptions& options);
  // Gradient of the logits.
  void (*differentiate)(
      const float* logits, const uint8_t* target, int64_t width, const FocalOptions& options, const Slopes& slopes,
      float* out);
};

// The loops for this processor.
const RowLoops& row_loops();

}  // namespace sam2fast
