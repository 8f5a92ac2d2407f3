// sam2fast::rle_parse, rle_decode and rle_resample on the CPU: checks, tensors and threads around rle.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "bands.h"
#include "rle.h"

namespace sam2fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxSide = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxTarget = 1 << 15;  // the products of weights fit in int64

void check_size(const char* name, int64_t height, int64_t width) {
  STD_TORCH_CHECK(
      0 < height && height <= kMaxSide && 0 < width && width <= kMaxSide,
      name, ": height and width must be 1 to 2^31 - 1, not ", height, " x ", width);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rle_parse(Tensor counts, Tensor offsets, int64_t height, int64_t width) {
  const bool compressed = counts.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(
      (compressed || counts.scalar_type() == ScalarType::Long) && counts.dim() == 1 &&
          offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1,
      "rle_parse: counts must be uint8 or int64 [L] and offsets int64 [N + 1]");
  check_size("rle_parse", height, width);
  counts = torch::stable::contiguous(counts);
  offsets = torch::stable::contiguous(offsets);
  const auto* bounds = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t n = offsets.numel() - 1;
  bool rising = n >= 0 && bounds[0] == 0 && bounds[n] == counts.numel();
  for (int64_t i = 0; rising && i < n; ++i) rising = bounds[i] <= bounds[i + 1];
  STD_TORCH_CHECK(rising, "rle_parse: offsets must rise from 0 to the length of counts");

  const int64_t pixels = height * width;
  Tensor ends = torch::stable::new_empty(offsets, {counts.numel()});
  Tensor lengths = torch::stable::new_empty(offsets, {n}), areas = torch::stable::new_empty(offsets, {n});
  Tensor status = torch::stable::new_empty(offsets, {n, 2});
  auto* end_data = static_cast<int64_t*>(ends.mutable_data_ptr());
  auto* length_data = static_cast<int64_t*>(lengths.mutable_data_ptr());
  auto* area_data = static_cast<int64_t*>(areas.mutable_data_ptr());
  auto* status_data = static_cast<int64_t*>(status.mutable_data_ptr());
  // On one thread: a mask takes a microsecond.
  for (int64_t i = 0; i < n; ++i) {
    const int64_t begin = bounds[i], count = bounds[i + 1] - begin;
    const auto room = static_cast<size_t>(count);
    const auto found = [&] {
      if (compressed) {
        const std::span text(static_cast<const uint8_t*>(counts.const_data_ptr()) + begin, room);
        return rle::parse(rle::TextReader(text), pixels, end_data + begin);
      }
      const std::span list(static_cast<const int64_t*>(counts.const_data_ptr()) + begin, room);
      return rle::parse(rle::ListReader(list), pixels, end_data + begin);
    }();
    std::fill(end_data + begin + found.runs, end_data + begin + count, pixels);
    length_data[i] = found.runs;
    area_data[i] = found.area;
    status_data[2 * i] = found.fault;
    status_data[2 * i + 1] = found.detail;
  }
  return {ends, lengths, areas, status};
}

// The runs of N masks, checked.
class Runs {
 public:
  Runs(const char* name, const Tensor& ends, const Tensor& starts, const Tensor& lengths, int64_t pixels)
      : ends_(torch::stable::contiguous(ends)),
        starts_(torch::stable::contiguous(starts)),
        lengths_(torch::stable::contiguous(lengths)) {
    bool fits = starts.numel() == lengths.numel();
    for (const Tensor* tensor : {&ends, &starts, &lengths})
      fits = fits && tensor->scalar_type() == ScalarType::Long && tensor->dim() == 1;
    STD_TORCH_CHECK(fits, name, ": ends must be int64 [L], starts and lengths int64 [N]");
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t start = value(starts_, i), length = value(lengths_, i);
      STD_TORCH_CHECK(
          0 <= start && 0 <= length && length <= ends.numel() && start <= ends.numel() - length,
          name, ": the runs of mask ", i, " leave the ", ends.numel(), " ends");
      STD_TORCH_CHECK(rle::is_valid(at(i), pixels), name, ": the ends of mask ", i, " do not rise to the number of its pixels");
    }
  }
  int64_t count() const { return starts_.numel(); }
  std::span<const int64_t> at(int64_t i) const {
    const auto* ends = static_cast<const int64_t*>(ends_.const_data_ptr());
    return {ends + value(starts_, i), static_cast<size_t>(value(lengths_, i))};
  }

 private:
  static int64_t value(const Tensor& tensor, int64_t i) {
    return static_cast<const int64_t*>(tensor.const_data_ptr())[i];
  }
  Tensor ends_, starts_, lengths_;
};

// New masks [N, rows, columns], bool or packed; `make` returns the function of a thread that draws mask i on a canvas.
template <typename Make>
Tensor draw_all(const Runs& runs, const Tensor& like, int64_t rows, int64_t columns, bool packed, const Make& make) {
  const int64_t bytes = rows * ((columns + 7) / 8);
  Tensor masks = torch::stable::new_empty(
      like, {runs.count(), rows, packed ? (columns + 7) / 8 : columns}, packed ? ScalarType::Byte : ScalarType::Bool);
  auto* data = static_cast<uint8_t*>(masks.mutable_data_ptr());
  for_each_index(runs.count(), [&] {
    return [&, draw = make(), scratch = std::vector<uint8_t>(packed ? 0 : static_cast<size_t>(bytes))](
               int64_t i) mutable {
      rle::Canvas canvas(packed ? data + i * bytes : scratch.data(), rows, columns);
      draw(runs.at(i), canvas);
      canvas.finish();
      if (!packed) canvas.expand(data + i * rows * columns);
    };
  });
  return masks;
}

Tensor rle_decode(Tensor ends, Tensor starts, Tensor lengths, int64_t height, int64_t width, bool packed) {
  check_size("rle_decode", height, width);
  const Runs runs("rle_decode", ends, starts, lengths, height * width);
  return draw_all(runs, ends, height, width, packed, [&] {
    return [=](std::span<const int64_t> own, rle::Canvas& canvas) { rle::draw(own, height, canvas); };
  });
}

Tensor rle_resample(
    Tensor ends, Tensor starts, Tensor lengths, int64_t height, int64_t width, int64_t top, int64_t bottom,
    int64_t left, int64_t right, int64_t to_top, int64_t to_bottom, int64_t to_left, int64_t to_right, int64_t side,
    bool flip, bool packed) {
  check_size("rle_resample", height, width);
  STD_TORCH_CHECK(
      0 <= top && top < bottom && bottom <= height && 0 <= left && left < right && right <= width,
      "rle_resample: the source must be a part of the mask");
  STD_TORCH_CHECK(
      side <= kMaxTarget && 0 <= to_top && to_top < to_bottom && to_bottom <= side && 0 <= to_left &&
          to_left < to_right && to_right <= side,
      "rle_resample: the target must be a part of the square, which is at most 2^15 a side");
  const Runs runs("rle_resample", ends, starts, lengths, height * width);
  const rle::Axis rows(bottom - top, to_bottom - to_top), columns(right - left, to_right - to_left);
  const rle::Placement place{top, left, to_top, to_left, side, flip};
  return draw_all(runs, ends, side, side, packed, [&] {
    return [resampler = rle::Resampler(height, rows, columns, place)](
               std::span<const int64_t> own, rle::Canvas& canvas) mutable { resampler.draw(own, canvas); };
  });
}

}  // namespace
}  // namespace sam2fast

STABLE_TORCH_LIBRARY_IMPL(sam2fast, CPU, m) {
  m.impl("rle_parse.cpp", TORCH_BOX(&sam2fast::rle_parse));
  m.impl("rle_decode.cpp", TORCH_BOX(&sam2fast::rle_decode));
  m.impl("rle_resample.cpp", TORCH_BOX(&sam2fast::rle_resample));
}
