// Loops over one row of pixels, compiled for several instruction sets (rows.cpp) and chosen when first used. Plain
// pointers only: a standard-library function compiled here with wide instructions must not reach the rest of the
// library.

#pragma once

#include <cstdint>

namespace sam2fast {

// One axis of bilinear upsampling (align_corners = False) by a whole factor s.
//
// Full-resolution index X lies at (X + 1/2) / s - 1/2 in units of low-resolution samples. Between two samples c and
// c + 1 ("cell" c) lie the s indices s c + floor(s / 2) + k, k = 0 ... s - 1, with the weight (2 k + [s even]) / (2 s)
// of sample c + 1. Cells -1 and size - 1 lie half outside: there both samples are the border sample. A padded row
// repeats its border samples, so that all size + 1 cells are alike.
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

// Pixels whose prediction (logit above 0) is wrong, and pixels outside the target.
struct RowCounts {
  int32_t wrong, background;
};

// Gradients of the float sums of a mask.
struct Slopes {
  float focal, p, p_inside;
};

// Floating-point formats that rows are read from and written to.
enum class Format { float32, bfloat16, float16 };

// What an upsampled logit becomes: activation(logit) * scale + bias. The numbers are those of the operator's argument.
enum class Activation : int64_t { none, sigmoid, binary };
struct Response {
  Activation activation;
  float scale, bias;
};

struct RowLoops {
  // `count` elements, `stride` apart where they are read and in a row where they are written.
  void (*load)(const void* source, Format format, int64_t stride, int64_t count, float* out);
  void (*store)(const float* row, int64_t count, Format format, void* out);
  // out = (1 - weight) * a + weight * b, from the nearer of the two: exact where they are equal, and no rounding of the
  // larger one where the smaller is nearer. `expand` does the same.
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
  // Stores the response to logits.
  void (*respond)(const float* logits, int64_t width, const Response& response, Format format, void* out);
  // Gradient of the logits from that of the response, which is not binary; only the sigmoid reads the logits.
  void (*trace_back)(
      const float* gradient, const float* logits, int64_t width, const Response& response, float* out);
  RowCounts (*count)(const float* logits, const uint8_t* target, int64_t width);
  // How deep each pixel lies in its column of missed (positive) or false (negative) pixels, as far as the row above
  // tells: `above` holds its depths, or zeros outside the image; 0 where the prediction is right.
  void (*depth_from_above)(
      const float* logits, const uint8_t* target, int64_t width, const int32_t* above, int32_t* out);
  // The same from the row below; `depth` keeps whichever is less deep.
  void (*depth_from_below)(const int32_t* below, int64_t width, int32_t* depth);
};

// The loops for this processor.
const RowLoops& row_loops();

}  // namespace sam2fast
